"""LLaVA-1.5: a CLIP vision tower read at its last layer but one, [CLS] dropped, a two-layer projector.

The tower is written out here instead of taken from transformers: it reads the vision weights alone, keeps
the layers after the tap out of the graph, and does not change with a transformers release. A test holds it
to transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.processor import image_values
from svdprune.exporter.towers.clip import DEFAULTS, ClipTower
from svdprune.exporter.towers.layers import Projector, depth_of, filled
from svdprune.runtime.errors import UserError

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


class Llava(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "llava"
    model_types = ("llava",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config, vision = checkpoint.config, vision_of(checkpoint)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} keeps [CLS] among the tokens: only 'default' is supported"
            )
        side = vision["image_size"] // vision["patch_size"]
        image = image_values(checkpoint)
        crop = image["crop"] or image["resize"]
        if crop is None:
            raise UserError("the processor does not resize pictures to the vision tower's size: that is not supported")
        height, width = crop.get("height", vision["image_size"]), crop.get("width", vision["image_size"])
        if (height, width) != (vision["image_size"],) * 2:
            raise UserError(
                f"the processor makes pictures of {width} x {height} but the vision tower takes squares of "
                f"{vision['image_size']}: the checkpoint's processor does not belong to its model"
            )
        return VisionSpec(
            height=height,
            width=width,
            grid=(side, side),
            channels=vision["hidden_size"],
            hidden=checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
            tap=tap_of(config),
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision, tap = vision_of(checkpoint), tap_of(checkpoint.config)
        with torch.device("meta"):
            tower = ClipTower(vision, depth_of(tap, vision["num_hidden_layers"]))
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

    def reference_tokens(self, model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tap = tap_of(vars(model.config))
        out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)  # type: ignore[union-attr,operator]
        last = (tap if tap >= 0 else len(out.hidden_states) + tap) - 1  # the layer that made hidden_states[tap]
        return out.hidden_states[tap][:, 1:], out.attentions[last][:, :, 0, 1:].mean(1)

    def reference_project(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)  # type: ignore[union-attr,operator]
        return projected


def vision_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The vision config, defaults filled in.

    Raises:
        UserError: another tower than CLIP's.
    """
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise UserError(f"a LLaVA with a {kind!r} vision tower is not supported: only 'clip_vision_model' is")
    return {**DEFAULTS, **given}


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
