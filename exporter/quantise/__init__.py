"""8-bit vision graphs at export: `plan_quantisation`, `quantise_vision`, then `measured` with the reference model."""

from __future__ import annotations

from svdprune.exporter.quantise.agreement import Asker, measured
from svdprune.exporter.quantise.plan import Plan, plan_quantisation
from svdprune.exporter.quantise.vision import Quantised, quantise_vision

__all__ = ["Asker", "Plan", "Quantised", "measured", "plan_quantisation", "quantise_vision"]
