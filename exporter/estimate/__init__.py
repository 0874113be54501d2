"""What a model should cost on a target, from its config alone: a roofline model, not a measurement."""

from svdprune.exporter.estimate.config import load_model
from svdprune.exporter.estimate.estimate import STAGES, Case, Estimate, Request, estimate, estimate_case
from svdprune.exporter.estimate.families import FAMILIES, read_model
from svdprune.exporter.estimate.memory import Memory

__all__ = [
    "FAMILIES",
    "STAGES",
    "Case",
    "Estimate",
    "Memory",
    "Request",
    "estimate",
    "estimate_case",
    "load_model",
    "read_model",
]
