"""The roofline estimate as the page shows it: for the bundle's own target, and a line for every other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.estimate import Case, Memory, Request, estimate, load_model
from svdprune.exporter.estimate.shapes import Model
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.manifest import Manifest, SelectorInfo
from svdprune.runtime.report.facts import Elsewhere, Estimated, EstimatedCase, EstimatedStage
from svdprune.runtime.targets import TARGETS, Target, find_target

OTHER = "fp16"  # what other targets are compared in
# A target without peaks gets these, of which nothing is shown.
_ANY_TFLOPS = _ANY_BANDWIDTH = 1.0


@dataclass(frozen=True)
class Counted:
    """The estimate, or why there is none; and the same model on the other targets."""

    estimate: Estimated | None = None
    note: str | None = None
    elsewhere: list[Elsewhere] = field(default_factory=list)


def counted(checkpoint: Checkpoint, manifest: Manifest) -> Counted:
    """What the sizes in the config come to."""
    vision = manifest.vision
    if vision.tiles is not None and vision.tiles.budget == "tile":
        return Counted(note="the roofline model counts K of the whole picture, and this bundle keeps K of each tile")
    target, selector = find_target(manifest.target), _config(vision.selector)
    decoder = manifest.decoder.engine.precision if manifest.decoder.engine else manifest.decoder.precision
    try:
        model = dataclasses.replace(load_model(str(checkpoint.folder)), name=manifest.model.id)
        own = _own(model, vision.keep, target, vision.precision, decoder, selector)
        if target.releases and manifest.decoder.engine is None:
            own.notes.append("this bundle has no decoder graph for engines: its decoder's times are those of one")
        return Counted(
            own,
            elsewhere=_elsewhere(model, vision.keep, target, selector),
        )
    except SvdpruneError as error:  # a model that the roofline does not know, a prompt that does not fit
        return Counted(note=str(error))


def _config(info: SelectorInfo) -> SelectorConfig:
    """The selector of a manifest; the start does not change what it costs."""
    given = {name: getattr(info, name) for name in ("rank", "variance", "block", "iterations", "centre", "seed")}
    return SelectorConfig(name=info.name, **{name: value for name, value in given.items() if value is not None})


def _own(model: Model, keep: int, target: Target, precision: str, decoder: str, selector: SelectorConfig) -> Estimated:
    timed = target.fp16_tflops is not None and target.bandwidth_gbs is not None
    found = estimate(
        model,
        keep,
        target.name,
        precision=precision,
        decoder_precision=decoder,
        request=Request(),
        selector=selector,
        tflops=None if timed else _ANY_TFLOPS,
        bandwidth=None if timed else _ANY_BANDWIDTH,
    )
    to_dict = found.to_dict()
    return Estimated(
        kind=to_dict["kind"],
        target=target.name,
        device=target.device,
        precision=precision,
        decoder_precision=decoder,
        prompt_tokens=found.request.prompt_tokens,
        new_tokens=found.request.new_tokens,
        pruned=_case(found.pruned, timed),
        unpruned=_case(found.unpruned, timed),
        free=found.pruned.memory.free,
        notes=list(found.notes) if timed else [],
    )


def _case(case: Case, timed: bool) -> EstimatedCase:
    stages = [
        EstimatedStage(name, s.flops, s.bytes, s.seconds if timed else None, s.bound if timed else None)
        for name, s in case.stages
    ]
    memory = case.memory
    return EstimatedCase(
        tokens=case.tokens,
        stages=stages,
        first_token=case.first_token if timed else None,
        answer=case.answer if timed else None,
        memory=_parts(memory, timed),
        total=memory.total,
        fits=memory.fits,
    )


def _parts(memory: Memory, engines: bool) -> dict[str, int]:
    """Bytes by words; what belongs to engines alone is left out where there are none."""
    kind = "engine" if engines else "graph"
    parts = {
        f"vision {kind}, with its activations": memory.vision_engine,
        f"decoder {kind}, with its activations": memory.decoder_engine,
        "embedding table": memory.embedding,
        "KV cache of the rows in use": memory.cache,
    }
    return parts | ({"peak of building the larger engine": memory.build} if engines else {})


def _elsewhere(model: Model, keep: int, own: Target, selector: SelectorConfig) -> list[Elsewhere]:
    lines = []
    for target in TARGETS.values():
        if target == own or target.fp16_tflops is None or OTHER not in target.precisions:
            continue
        found = estimate(model, keep, target.name, precision=OTHER, request=Request(), selector=selector)
        a, b = found.pruned, found.unpruned
        lines.append(
            Elsewhere(target.name, target.device, OTHER, a.first_token, b.first_token, a.memory.total, a.memory.fits)
        )
    return lines
