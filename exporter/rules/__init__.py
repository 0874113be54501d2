"""What each TensorRT release takes of ONNX, and whether a graph keeps to it."""

from __future__ import annotations

from svdprune.exporter.rules.check import (
    DECODER_OPERATORS,
    Violation,
    check_graph,
    check_target,
    refuse_violations,
    releases_with,
)

__all__ = ["DECODER_OPERATORS", "Violation", "check_graph", "check_target", "refuse_violations", "releases_with"]
