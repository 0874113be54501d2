"""Which vision tokens stay: scorers, each as a torch module, an ONNX graph and a float64 reference."""

from __future__ import annotations

from svdprune.exporter.selection import baselines, coverage, dpp, leverage  # noqa: F401  (they register the selectors)
from svdprune.exporter.selection.build import Selector, build_selector, selector_model
from svdprune.exporter.selection.config import SelectorConfig, parse_keep
from svdprune.exporter.selection.reference import keep_indices, reference_scores
from svdprune.exporter.selection.registry import default_selector, register, selector_names

__all__ = [
    "Selector",
    "SelectorConfig",
    "build_selector",
    "default_selector",
    "keep_indices",
    "parse_keep",
    "reference_scores",
    "register",
    "selector_model",
    "selector_names",
]
