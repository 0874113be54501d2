"""Model families: how the vision part of a checkpoint is read, run up to the tap, and projected.

One file a family. `family_of` picks by the checkpoint's `model_type`; everything else in the exporter
speaks to a `Family` and knows no model by name.
"""

from svdprune.exporter.families.base import Family, VisionSpec, family_of, supported_model_types

__all__ = ["Family", "VisionSpec", "family_of", "supported_model_types"]
