"""LLaVA-1.5: a CLIP vision tower read at its last layer but one, [CLS] dropped, a two-layer projector.

Models of the same class with a SigLIP or a DINOv2 tower are taken as well. The tower is written out here instead of
taken from transformers: it reads the vision weights alone, keeps the layers after the tap out of the graph, and does
not change with a transformers release. A test holds it to transformers' own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.processor import image_values
from svdprune.exporter.towers import clip, dinov2, siglip
from svdprune.exporter.towers.layers import Projector, depth_of, filled
from svdprune.runtime.errors import UserError

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


@dataclass(frozen=True)
class TowerKind:
    """What a kind of tower is like: its config's defaults, whether it has a [CLS] token (dropped by the strategy
    "default"; without one the strategy is "full"), and whether it takes pictures of other sizes than its own."""

    defaults: Mapping[str, Any]
    cls: bool = True
    any_size: bool = False

    @property
    def strategy(self) -> str:
        """The `vision_feature_select_strategy` that gives the patches and no others."""
        return "default" if self.cls else "full"


TOWERS = {
    "clip_vision_model": TowerKind(clip.DEFAULTS),
    "siglip_vision_model": TowerKind(siglip.DEFAULTS, cls=False),
    "dinov2": TowerKind(dinov2.DEFAULTS, any_size=True),
}


class Llava(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "llava"
    model_types = ("llava",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config, vision = checkpoint.config, vision_of(checkpoint)
        kind = TOWERS[vision["model_type"]]
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != kind.strategy:
            what = "keeps [CLS] among the tokens" if kind.cls else "drops a token that this tower does not have"
            raise UserError(f"vision_feature_select_strategy {strategy!r} {what}: only {kind.strategy!r} is supported")
        image = image_values(checkpoint)
        height, width = _picture(image, vision, kind)
        return VisionSpec(
            height=height,
            width=width,
            grid=_grid((height, width), vision),
            channels=vision["hidden_size"],
            hidden=checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
            tap=tap_of(config),
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            cls=kind.cls,
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision = vision_of(checkpoint)
        depth = depth_of(tap_of(checkpoint.config), vision["num_hidden_layers"])
        if vision["model_type"] == "dinov2":
            size = _picture(image_values(checkpoint), vision, TOWERS["dinov2"])
            return dinov2.dinov2_tower(vision, depth, _grid(size, vision), checkpoint, TOWER)
        with torch.device("meta"):
            siglips = vision["model_type"] == "siglip_vision_model"
            tower = siglip.SiglipTower(vision, depth) if siglips else clip.ClipTower(vision, depth)
        return filled(tower, checkpoint, TOWER)

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        config = checkpoint.config
        with torch.device("meta"):
            projector = Projector(
                vision_of(checkpoint)["hidden_size"],
                checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
                config.get("projector_hidden_act", "gelu"),
                config.get("multimodal_projector_bias", True),
            )
        return filled(projector, checkpoint, PROJECTOR)

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        tap, cls = tap_of(vars(model.config)), TOWERS[model.config.vision_config.model_type].cls
        out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=cls)
        if not cls:
            return out.hidden_states[tap], None
        last = (tap if tap >= 0 else len(out.hidden_states) + tap) - 1  # the layer that made hidden_states[tap]
        return out.hidden_states[tap][:, 1:], out.attentions[last][:, :, 0, 1:].mean(1)

    def reference_project(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)  # type: ignore[union-attr,operator]
        return projected


def vision_of(checkpoint: Checkpoint, kinds: Collection[str] = tuple(TOWERS)) -> dict[str, Any]:
    """The vision config, defaults filled in.

    Raises:
        UserError: another tower than those of `kinds`, or a variant of one that is not supported.
    """
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", "clip_vision_model")
    if kind not in kinds:
        raise UserError(f"a LLaVA with a {kind!r} vision tower is not supported: supported are {', '.join(kinds)}")
    vision = {**TOWERS[kind].defaults, "model_type": kind, **given}
    if kind == "dinov2":
        dinov2.check_dinov2(vision)
    return vision


def _picture(image: Mapping[str, Any], vision: Mapping[str, Any], kind: TowerKind) -> tuple[int, int]:
    """(height, width) of what the processor gives the tower.

    Raises:
        UserError: the tower does not take that.
    """
    own = vision["image_size"]
    crop = image["crop"] or image["resize"] or {}
    height, width = crop.get("height", own), crop.get("width", own)
    if not kind.any_size and (height, width) != (own, own):
        raise UserError(
            f"the processor makes pictures of {width} x {height} but the vision tower takes squares of {own}: the "
            "checkpoint's processor does not belong to its model"
        )
    if height % vision["patch_size"] or width % vision["patch_size"]:
        raise UserError(
            f"the processor makes pictures of {width} x {height}, which are no whole patches of "
            f"{vision['patch_size']}: set its crop_size to a multiple of that"
        )
    return height, width


def _grid(size: tuple[int, int], vision: Mapping[str, Any]) -> tuple[int, int]:
    return size[0] // vision["patch_size"], size[1] // vision["patch_size"]


def tap_of(config: Mapping[str, Any], default: int = -2) -> int:
    """The hidden state that features are, counted as the config counts.

    Raises:
        UserError: several.
    """
    tap = config.get("vision_feature_layer", default)
    if not isinstance(tap, int):
        raise UserError(f"vision_feature_layer {tap!r} takes features of several layers: only one layer is supported")
    return tap


FAMILY = Llava()
