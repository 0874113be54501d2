"""The vision graph of an export as a file: built for a K, quantised where that is asked for, checked for its target."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from svdprune.calib.progress import Progress
from svdprune.exporter.calibrate.apply import Chosen
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.quantise import Plan, Quantised, quantise_vision
from svdprune.exporter.rules import check_target, refuse_violations
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime.targets import Target

GRAPH = "vision.onnx"


@dataclass(frozen=True)
class VisionFile:
    """How the vision graph of one export is made, whatever its K.

    Attributes:
        precision: as asked for. plan: of an 8-bit graph, None for others. raw: whether it takes bytes.
    """

    checkpoint: Checkpoint
    family: Family
    spec: VisionSpec
    chosen: Chosen
    precision: str
    plan: Plan | None
    raw: bool
    target: Target

    def write(self, keep: int, path: Path, progress: Progress) -> Quantised | None:
        """Write the graph that keeps `keep` tokens (and `<path>.data` when it is large); what 8 bits changed.

        Raises:
            UserError: more blocks to leave in float than there are, or a graph that a TensorRT release of the target
                would refuse.
            NumericalError: NaN or infinity on a calibration picture.
        """
        build = partial(
            build_vision,
            self.checkpoint,
            self.family,
            self.spec,
            self.chosen.config,
            keep,
            precision=self.plan.float_type if self.plan else self.precision,
            raw=self.raw,
            start=self.chosen.start,
            gpu=self.target.sm is not None,
            report=lambda stage: progress(stage, 0.1),
        )
        quantised = None
        if self.plan:
            quantised = quantise_vision(
                build, path, self.plan, lambda stage, share: progress(stage, 0.15 + 0.2 * share)
            )
        else:
            graph = build()
            progress("writing the vision graph", 0.3)
            save_graph(graph, path)
        refuse_violations(check_target(path, self.target), "vision graph", self.target)
        return quantised


def move_graph(source: Path, place: Path) -> None:
    """Move a graph, and the weights beside it, to another folder under the same name."""
    for file in source.parent.glob(f"{source.name}*"):
        shutil.move(file, place.with_name(file.name))
