"""What each TensorRT release takes of ONNX, and whether a graph keeps to it."""

from __future__ import annotations

from svdprune.exporter.rules.check import Violation, check_graph, check_target, refuse_violations

__all__ = ["Violation", "check_graph", "check_target", "refuse_violations"]
