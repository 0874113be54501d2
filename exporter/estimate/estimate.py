"""The estimate of one model on one target: every stage at K vision tokens and at all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from svdprune.exporter.estimate.config import load_model
from svdprune.exporter.estimate.costs import Format, connector_work, decoder_work, format_of, vision_work
from svdprune.exporter.estimate.counting import selection_work
from svdprune.exporter.estimate.memory import Memory, memory_of
from svdprune.exporter.estimate.shapes import Model
from svdprune.exporter.selection import SelectorConfig, parse_keep
from svdprune.runtime.errors import UserError
from svdprune.runtime.roofline import DEFAULT, NOT_MEASURED, Efficiency, Machine, StageTime, Work, machine, stage_time
from svdprune.runtime.targets import check_precision, find_target

STAGES = ("vision", "selection", "projector", "prefill", "decode step")


@dataclass(frozen=True)
class Request:
    """What is asked of the model: `prompt_tokens` of text beside the picture, `new_tokens` answered, `batch` at once.

    `cache` rows of KV cache are allocated for a sequence; None for as many as the request fills.
    """

    prompt_tokens: int = 64
    new_tokens: int = 64
    batch: int = 1
    cache: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")


@dataclass(frozen=True)
class Case:
    """The estimate with a given number of vision tokens.

    Attributes:
        tokens: vision tokens that the language model gets.
        stages: (name, time) in the order of STAGES. "decode step" is one new token in the middle of the answer.
        first_token: seconds to the first token: all stages but the decode step, preprocessing not counted.
        answer: seconds of the whole answer.
        memory: bytes.
    """

    tokens: int
    stages: tuple[tuple[str, StageTime], ...]
    first_token: float
    answer: float
    memory: Memory

    def stage(self, name: str) -> StageTime:
        """The stage called `name`."""
        return dict(self.stages)[name]


@dataclass(frozen=True)
class Estimate:
    """What `estimate` gives. `pruned` at K tokens, `unpruned` at all."""

    model: Model
    machine: Machine
    device: str
    precision: str
    decoder_precision: str
    request: Request
    efficiency: Efficiency
    pruned: Case
    unpruned: Case
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the words that mark it as a model."""
        return {
            "kind": NOT_MEASURED,
            "model": self.model.name,
            "target": self.machine.name,
            "device": self.device,
            "precision": self.precision,
            "decoder_precision": self.decoder_precision,
            "machine": {"peaks": dict(self.machine.peaks), "bandwidth": self.machine.bandwidth},
            "request": asdict(self.request),
            "efficiency": asdict(self.efficiency),
            "parameters": {"vision": self.model.vision_parameters, "decoder": self.model.text.parameters},
            "pruned": _case(self.pruned),
            "unpruned": _case(self.unpruned),
            "notes": list(self.notes),
        }


def estimate(
    model: str | Model,
    keep: int | str,
    target: str,
    *,
    precision: str = "fp16",
    decoder_precision: str | None = None,
    request: Request | None = None,
    selector: SelectorConfig | None = None,
    picture: tuple[int, int] | None = None,
    crops: int | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    efficiency: Efficiency = DEFAULT,
    revision: str | None = None,
) -> Estimate:
    """Estimate `model` (an alias, hub id or folder, of which only the config is read) on `target`.

    Args:
        keep: K as a count or a share ("10%").
        precision: of the vision encoder; decoder_precision: of the language model, the same by default.
        picture: (width, height), for a model that takes any; crops: how many crops a picture is cut into.
        tflops, bandwidth: peaks instead of the target's (dense FP16 TFLOPS, GB/s).

    Raises:
        UserError: an unknown model, target or precision, K beyond the tokens, a precision that the target does not run,
            a target without peaks, or a request longer than the model's context or the cache.
    """
    row = find_target(target)
    decoder_precision = decoder_precision or precision
    check_precision(row, precision)
    check_precision(row, decoder_precision)
    on = machine(row, tflops, bandwidth)
    known = load_model(model, revision, picture=picture, crops=crops) if isinstance(model, str) else model
    count = parse_keep(keep, known.tokens)
    chooser = selector or SelectorConfig()
    if count < known.tokens:
        chooser.check(tokens=known.tokens, channels=known.selected_channels, keep=count)
    forms = format_of(precision), format_of(decoder_precision)
    asked = request or Request()
    notes = list(known.notes)
    if row.sm is None:
        notes.append("one peak for every precision: that of the flags")
    return Estimate(
        known, on, row.device, precision, decoder_precision, asked, efficiency,
        pruned=estimate_case(known, count, asked, on, *forms, chooser, efficiency, row.sm is not None),
        unpruned=estimate_case(known, known.tokens, asked, on, *forms, chooser, efficiency),
        notes=tuple(notes),
    )  # fmt: skip


def estimate_case(
    model: Model,
    keep: int,
    request: Request,
    on: Machine,
    vision: Format,
    decoder: Format,
    selector: SelectorConfig,
    efficiency: Efficiency = DEFAULT,
    gpu: bool = True,
) -> Case:
    """The stages and the memory with `keep` vision tokens; with all of them nothing is selected.

    `gpu`: the selection in the form that exports for a GPU have.

    Raises:
        UserError: the request does not fit the cache or the model's context.
    """
    rows = keep + request.prompt_tokens
    length = rows + request.new_tokens
    cache = request.cache if request.cache is not None else length
    for limit, what in ((cache, "cache"), (model.text.context, "model's context")):
        if length > limit:
            raise UserError(
                f"{keep} vision tokens, {request.prompt_tokens} of text and {request.new_tokens} new ones are {length} "
                f"rows, but the {what} has {limit}"
            )
    batch = request.batch
    works: dict[str, list[Work]] = {
        "vision": vision_work(model.tower, batch * model.crops, vision),
        "selection": [],
        "projector": connector_work(
            model.connector, batch * (keep if model.connector.selects_first else model.tokens), vision
        ),
        "prefill": decoder_work(model.text, rows, 0, batch, decoder),
        "decode step": decoder_work(model.text, 1, rows + request.new_tokens // 2, batch, decoder),
    }
    if keep < model.tokens:
        grid = (model.tokens, 1)
        works["selection"] = selection_work(selector, model.tokens, model.selected_channels, keep, batch, grid, gpu)
    stages = tuple((name, stage_time(works[name], on, efficiency)) for name in STAGES)
    times = {name: stage.seconds for name, stage in stages}
    first = sum(times.values()) - times["decode step"]
    return Case(
        tokens=keep,
        stages=stages,
        first_token=first,
        answer=first + (request.new_tokens - 1) * times["decode step"],
        memory=memory_of(model, keep, rows, cache, batch, vision, decoder, on),
    )


def _case(case: Case) -> dict[str, Any]:
    memory = case.memory
    derived = ("vision_engine", "decoder_engine", "total", "free", "fits", "build_fits")
    return {
        "tokens": case.tokens,
        "stages": {name: asdict(stage) for name, stage in case.stages},
        "first_token_seconds": case.first_token,
        "answer_seconds": case.answer,
        "memory": {**asdict(memory), **{name: getattr(memory, name) for name in derived}},
    }
