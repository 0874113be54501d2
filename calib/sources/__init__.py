"""Pictures and questions to calibrate and measure with: `open_source("spec")`.

A spec is a folder, or `scheme:rest` with one of `schemes()`; one file a scheme, in this folder. No torch.
"""

from __future__ import annotations

from svdprune.calib.sources import benchmarks, easy_vqa, folder, hub, scenes  # noqa: F401  (they register the schemes)
from svdprune.calib.sources.base import (
    DEFAULT_QUESTIONS,
    Entry,
    Labelled,
    Listing,
    Sample,
    Source,
    open_source,
    pictures,
    register,
    schemes,
)
from svdprune.calib.sources.protocols import Protocol

__all__ = [
    "DEFAULT_QUESTIONS",
    "Entry",
    "Labelled",
    "Listing",
    "Protocol",
    "Sample",
    "Source",
    "open_source",
    "pictures",
    "register",
    "schemes",
]
