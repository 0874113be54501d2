"""Time every stage of an answer, pruned and unpruned in turn, so that whatever else the machine does falls on both."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import Span
from svdprune.runtime.profile.graphs import Graph, kept_of, pruned_graph, whole_graph
from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.report import (
    DECODE,
    FIRST_TOKEN,
    PREFILL,
    PREPROCESS,
    SELECTION,
    TOTAL,
    VISION,
    Arm,
    ProfileReport,
    ratios,
)
from svdprune.runtime.profile.runners import Feed, quiet
from svdprune.runtime.profile.stats import Summary
from svdprune.runtime.profile.where import backend_versions, where
from svdprune.runtime.prompt import CachedPrompt, Pictured
from svdprune.runtime.tiling.feed import prepare, rows_of
from svdprune.runtime.verify_golden import read_golden
from svdprune.runtime.verify_metrics import decoder_precision
from svdprune.runtime.vision import check_finite
from svdprune.runtime.vlm import Vlm, load

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure: ``runs`` counted after ``warm_up`` uncounted ones, each decoding ``new_tokens`` tokens.

    ``unpruned`` runs the graph without its selection in turn; ``layers`` also measures every layer, in runs apart.
    """

    runs: int = 20
    warm_up: int = 3
    new_tokens: int = 16
    unpruned: bool = True
    layers: bool = True

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warm_up", 0), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, it must be {least} or more")


@dataclass
class Timings:
    """Seconds of each stage, one entry a run (``decode``: one a token), and the rows of the prompt."""

    stages: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    prompt: int = 0


def profile(
    bundle: str | Path,
    vision: str = "onnxruntime",
    decoder: str = "onnxruntime",
    threads: int | None = None,
    checkpoint: str | None = None,
    image: str | Path | None = None,
    question: str | None = None,
    plan: Plan | None = None,
    progress: Progress = lambda step, share: None,
) -> ProfileReport:
    """Profile a bundle on this machine.

    Args:
        bundle, vision, decoder, threads, checkpoint: as ``load`` takes them.
        image, question: the input; None takes the golden case's.
        plan: how much to measure.
        progress: called with a step's name and the share of the whole that is done.

    Raises:
        BundleError, UserError: as ``load``; also where the prompt with all tokens does not fit the decoder.
        NumericalError: NaN or infinity on the way.
        MissingDependency: Polygraphy, or onnx for the unpruned graph, is not installed.
    """
    plan = plan or Plan()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        progress("opening the bundle", 0.0)
        vlm = stack.enter_context(load(bundle, vision, decoder, threads, checkpoint=checkpoint))
        picture = Path(image) if image is not None else vlm.bundle.file(vlm.manifest.golden.image)
        asked = question if question is not None else read_golden(vlm.bundle).question
        found = where(vision, decoder, threads, backend_versions(vlm))  # the load before this run adds to it
        graphs = [pruned_graph(vlm, threads)]
        if plan.unpruned:
            progress("taking the selection out of a copy of the vision graph", None)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdprune-profile-")))
            graphs.append(whole_graph(vlm, threads, folder, stack))
        for graph in graphs:
            _check_room(vlm, graph, asked, plan.new_tokens)
        with ExitStack() as active:
            for graph in graphs:
                active.enter_context(graph.runner)
            timings = in_turn(vlm, graphs, picture, asked, plan, progress)
        arms = []
        for graph in graphs:
            table = None
            if plan.layers and graph.layers is not None:
                progress(f"timing the layers of the {graph.name} graph", 0.9)
                table = graph.layers(_feed(vlm, picture), plan.runs, plan.warm_up)
            arms.append(arm_of(graph, timings[graph.name], table, plan.layers))
        progress("done", 1.0)
    pruned, whole = arms[0], arms[1] if len(arms) > 1 else None
    manifest = vlm.manifest
    return ProfileReport(
        bundle=str(bundle),
        model=manifest.model.id,
        target=manifest.target,
        vision=vision,
        vision_precision=manifest.vision.precision,
        decoder=decoder,
        decoder_precision=decoder_precision(manifest, decoder),
        image=str(picture),
        question=asked,
        tokens=manifest.vision.tokens,
        runs=plan.runs,
        warm_up=plan.warm_up,
        new_tokens=plan.new_tokens,
        where=found,
        pruned=pruned,
        unpruned=whole,
        ratios=ratios(pruned, whole),
    )


def in_turn(
    vlm: Vlm, graphs: list[Graph], picture: Path, question: str, plan: Plan, progress: Progress
) -> dict[str, Timings]:
    """Every graph once a round; the first of a round alternates, so that neither always follows the other."""
    timings = {graph.name: Timings() for graph in graphs}
    rounds = plan.warm_up + plan.runs
    for number in range(rounds):
        warming = number < plan.warm_up
        progress("warming up" if warming else "measuring", 0.9 * number / rounds)
        for graph in graphs if number % 2 == 0 else reversed(graphs):
            _run(vlm, graph, picture, question, plan.new_tokens, Timings() if warming else timings[graph.name])
    return timings


def _run(vlm: Vlm, graph: Graph, picture: Path, question: str, new_tokens: int, into: Timings) -> None:
    """One answer, greedy, ``new_tokens`` long whatever the tokens are: end tokens do not stop it."""
    clock, stages = time.perf_counter, into.stages
    began = clock()
    prepared = prepare(picture, vlm.settings, vlm.manifest)
    stages[PREPROCESS].append(clock() - began)
    outputs = graph.runner.infer(prepared.inputs, check_inputs=False)
    stages[VISION].append(graph.runner.last_inference_time())
    manifest = vlm.manifest
    began = clock()
    seen = rows_of(prepared, outputs, vlm)
    stages[VISION][-1] += clock() - began
    if seen is None:
        seen = Pictured(Span(kept_of(graph, dict(outputs)), manifest.vision.tokens), outputs["features"][0])
    if isinstance(seen.features, np.ndarray):
        check_finite("features", seen.features)
    prompt = CachedPrompt(
        vlm.decoder, vlm.embed, [seen], vlm.positions, manifest.decoder, manifest.processor.image_token_id
    )
    began = clock()
    token = int(prompt.advance(vlm.prompt_ids(question)).argmax())
    stages[PREFILL].append(clock() - began)
    into.prompt = prompt.rows
    decoded = []
    for _ in range(new_tokens):
        began = clock()
        token = int(prompt.push(token).argmax())
        decoded.append(clock() - began)
    stages[DECODE] += decoded
    stages[FIRST_TOKEN].append(sum(stages[stage][-1] for stage in (PREPROCESS, VISION, PREFILL)))
    stages[TOTAL].append(stages[FIRST_TOKEN][-1] + sum(decoded))


def _feed(vlm: Vlm, picture: Path) -> Feed:
    """The picture as the vision graph takes it."""
    return prepare(picture, vlm.settings, vlm.manifest).inputs


def _check_room(vlm: Vlm, graph: Graph, question: str, new_tokens: int) -> None:
    """Before the work, not in its middle."""
    text = len(vlm.prompt_ids(question)) - 1  # without the picture's token
    rows = text + graph.tokens + new_tokens
    positions = rows if vlm.positions == "compact" else text + vlm.manifest.vision.tokens + new_tokens
    most, needed = vlm.manifest.decoder.context, positions
    if vlm.decoder.capacity is not None and rows > vlm.decoder.capacity:
        most, needed = vlm.decoder.capacity, rows
    if needed > most:
        remedy = "give --no-unpruned" if graph.name == "unpruned" else "ask a shorter question or decode fewer tokens"
        raise UserError(
            f"the {graph.name} prompt and {new_tokens} new tokens need {needed:,} places in the decoder, which has "
            f"{most:,}: {remedy}"
        )


def arm_of(graph: Graph, timings: Timings, table: LayerTable | None, wanted: bool) -> Arm:
    """Sum up one graph's timings; `wanted` tells whether the times of its layers were asked for."""
    stages = {name: Summary.of(seconds) for name, seconds in timings.stages.items()}
    notes = []
    if wanted and table is None:
        notes.append(graph.reason)
    if table is not None and graph.name == "pruned":
        if table.selection is not None:
            stages[SELECTION] = table.selection
        else:
            notes.append("the engine has layers that do part of the selection and of the encoder: not told apart")
    return Arm(graph.name, graph.tokens, timings.prompt, stages, table, notes)
