"""LLaVA-OneVision: SigLIP on the tiles of an enlarged picture, whose grid is made smaller where it has too many tokens.

The grid is resampled after the projector, so the selection sees the same weighted sums of tokens before it, and the
features of the kept ones are the sums of their sources' features.

The last hidden state is taken before the tower's last norm, as transformers 5 takes it. The code of 4.57.1 takes
it after the norm, and its rows differ.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.anyres import anyres_spec, newline
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.families.llava import PROJECTOR, TOWER, tap_of
from svdprune.exporter.processor import image_values
from svdprune.exporter.towers.layers import Projector, depth_of, filled
from svdprune.exporter.towers.siglip import DEFAULTS, SiglipTower
from svdprune.runtime.errors import UserError

# Defaults of transformers' LlavaOnevisionConfig: a config.json may leave these out.
_SIDES = range(384, 2305, 384)
_PINPOINTS = [[height, width] for height in _SIDES for width in _SIDES]
_ASPECT = "anyres_max_9"
_TAP = -1


class LlavaOnevision(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config = checkpoint.config
        strategy = config.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} drops a token that SigLIP does not have: only 'full' is "
                "supported"
            )
        aspect = config.get("vision_aspect_ratio", _ASPECT)
        limit = re.fullmatch(r"anyres_max_(\d+)", str(aspect))
        if limit is None:
            raise UserError(f"vision_aspect_ratio {aspect!r} is not supported: only anyres_max_<number> is")
        hidden = checkpoint.info(PROJECTOR + "linear_2.weight").shape[0]
        vision, tap = _vision(checkpoint), tap_of(config, _TAP)
        tile = {"tile": vision["image_size"], "side": vision["image_size"] // vision["patch_size"]}
        mean = image_values(checkpoint)["mean"]
        tilings = {  # a picture beside others, and the frames of a video, are one tile each
            "several": {"kind": "square", **tile, "background": [int(255 * value) for value in mean]},
            "video": {"kind": "pooled", **tile},
        }
        return anyres_spec(
            checkpoint, vision, hidden, tap, _PINPOINTS, pool_above=int(limit[1]), tilings=tilings, cls=False
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision, tap = _vision(checkpoint), tap_of(checkpoint.config, _TAP)
        with torch.device("meta"):
            tower = SiglipTower(vision, depth_of(tap, vision["num_hidden_layers"]))
        return filled(tower, checkpoint, TOWER)

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        config = checkpoint.config
        with torch.device("meta"):
            projector = Projector(
                _vision(checkpoint)["hidden_size"],
                checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
                config.get("projector_hidden_act", "gelu"),
                config.get("multimodal_projector_bias", True),
            )
        return filled(projector, checkpoint, PROJECTOR)

    def marks(self, checkpoint: Checkpoint) -> torch.Tensor | None:
        return newline(checkpoint)

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = model.model.vision_tower(pixels, output_hidden_states=True)
        return out.hidden_states[tap_of(vars(model.config), _TAP)], None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)
        return projected


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise UserError(
            f"a LLaVA-OneVision with a {kind!r} vision tower is not supported: only 'siglip_vision_model' is"
        )
    return {**DEFAULTS, **given}


FAMILY = LlavaOnevision()
