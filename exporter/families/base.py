"""What a family has to say, and the table of those there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.runtime.errors import UserError


@dataclass(frozen=True)
class VisionSpec:
    """Sizes of the vision part, all read from the checkpoint's config.

    height, width: of the input picture, pixels. grid: rows and columns of patches; tokens: their product.
    channels: D, width of the features at the tap. hidden: H, width of the language model's embeddings.
    tap: which hidden state the features are, counted as the config counts it.
    mean, std: per channel, of pictures scaled to [0, 1].
    """

    height: int
    width: int
    grid: tuple[int, int]
    channels: int
    hidden: int
    tap: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class Family(Protocol):
    """How one kind of VLM is cut: encoder up to the tap, selection, what follows it."""

    name: str
    model_types: tuple[str, ...]

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        """Sizes from the config alone; a `UserError` for a variant that is not supported, naming it."""
        ...

    def encoder(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """float (B, 3, height, width), normalised -> tokens (B, T, D) at the tap and [CLS] attention (B, T).

        Reads the vision tower's weights and no others; keeps their dtype.
        """
        ...

    def projector(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """What follows the selection: (B, K, D) -> (B, K, H)."""
        ...

    def reference_tokens(self, model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encoder` returns, computed by the model as transformers builds it: the check of `encoder`."""
        ...

    def reference_project(self, model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What `projector` returns, computed by the model as transformers builds it."""
        ...


_MODULES = ("llava",)  # one file each, in this folder


def _families() -> Mapping[str, Family]:
    found: dict[str, Family] = {}
    for module in _MODULES:
        family: Family = importlib.import_module(f"svdprune.exporter.families.{module}").FAMILY
        found.update(dict.fromkeys(family.model_types, family))
    return found


def supported_model_types() -> tuple[str, ...]:
    """The values of `model_type` that can be exported."""
    return tuple(_families())


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a checkpoint's `config.json`; `where` names the checkpoint in errors."""
    kind = config.get("model_type")
    families = _families()
    if isinstance(kind, str) and kind in families:
        return families[kind]
    known = ", ".join(families)
    if "vision_config" not in config:
        raise UserError(
            f"{where} is not a vision-language model (model_type {kind!r} has no vision_config): supported are {known}"
        )
    raise UserError(f"{where} has model_type {kind!r}, which is not supported yet: supported are {known}")
