"""What is asked for, checked before any work: the scheme, the float type around it, the pictures, the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from svdprune.calib.quantise import SCHEMES, Scheme
from svdprune.calib.sources import Sample, open_source
from svdprune.exporter.families import VisionSpec
from svdprune.exporter.feed import feed_of
from svdprune.runtime.errors import UserError
from svdprune.runtime.preprocess import ImageSettings
from svdprune.runtime.targets import Target
from svdprune.runtime.tiling.feed import Prepared

SOURCE = "scenes:calibration"  # drawn by this project; a series that neither training nor evaluation draws
AUTO, NONE = "auto", "none"
LEAST, MOST = 12, 128  # pictures
SWEPT, HELD_OUT = 16, 32  # of them, at most: to choose by, and to report on


@dataclass(frozen=True)
class Plan:
    """How the vision graph will be quantised.

    Attributes:
        scheme: int8 or fp8. float_type: precision of everything else in the graph, "fp32" or "fp16".
        sensitive: blocks left in float: ``auto`` (as many as the targets need), ``none``, or a count.
        for_cpu: whether the target runs ONNX Runtime's integer kernels.
        source: where the pictures come from.
        calibration, swept: the graph's inputs for each picture. held_out: the same, with a question each.
    """

    scheme: Scheme
    float_type: str
    sensitive: str
    for_cpu: bool
    source: str
    calibration: list[Prepared]
    swept: list[Prepared]
    held_out: list[tuple[Prepared, str]]


def plan_quantisation(
    precision: str,
    target: Target,
    pictures: str | None,
    sensitive: str | None,
    images: ImageSettings,
    spec: VisionSpec,
    raw: bool,
    seed: int,
    report: Callable[[str], None] = lambda stage: None,
) -> Plan | None:
    """The plan for a precision, None for one that is not quantised.

    Args:
        pictures: a spec as of ``svdprune.calib.sources``, None for the project's own drawn scenes.
        sensitive: ``auto``, ``none`` or a count of blocks; None for ``auto``.
        images: how a picture becomes pixels, with the tiling of `spec`; raw: whether the graph takes bytes or
            normalised floats.
        seed: of the choice among the pictures.

    Raises:
        UserError: options that only an 8-bit graph takes; blocks that are no count; too few pictures.
    """
    if precision not in SCHEMES:
        for value, option in ((pictures, "--calibration-images"), (sensitive, "--sensitive")):
            if value is not None:
                raise UserError(f"{option} belongs to --precision {' or '.join(SCHEMES)}, not to {precision}")
        return None
    wanted = (sensitive or AUTO).strip().lower()
    if wanted not in (AUTO, NONE) and not wanted.isdecimal():
        raise UserError(
            f"--sensitive {sensitive} is not possible: give auto, none, or how many blocks to leave in float"
        )
    source = open_source(pictures or SOURCE, limit=MOST, seed=seed, at_least=LEAST)
    report("reading the calibration pictures")
    seen = [_seen(sample, number, images, spec, raw) for number, sample in enumerate(source.samples())]
    if source.broken:
        report(f"calibration pictures: {source.describe_broken()}")
    held_out, swept = min(HELD_OUT, len(seen) // 4), min(SWEPT, len(seen) // 4)
    return Plan(
        SCHEMES[precision],
        "fp32" if target.sm is None else "fp16",  # what a GPU does not compute in 8 bits it should not in 32
        wanted,
        target.sm is None,
        source.spec,
        [fed for fed, _ in seen[held_out + swept :]],
        [fed for fed, _ in seen[held_out : held_out + swept]],
        seen[:held_out],
    )


def _seen(sample: Sample, number: int, images: ImageSettings, spec: VisionSpec, raw: bool) -> tuple[Prepared, str]:
    """Inputs and one of the picture's questions, the kinds in turn."""
    question = sample.questions[number % len(sample.questions)].text
    return feed_of(sample.image, images, spec, raw), question
