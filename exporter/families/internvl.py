"""InternVL: InternViT on tiles in a grid near the picture's shape, pixel shuffle, a norm and two linear layers.

The pixel shuffle joins squares of patches before the selection: what is kept or dropped are tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.families.llava import PROJECTOR, TOWER, tap_of
from svdprune.exporter.processor import image_processor, image_token, image_values, read_tokenizer, special_token
from svdprune.exporter.towers.internvl import DEFAULTS, InternVisionTower
from svdprune.exporter.towers.layers import Projector, depth_of, filled
from svdprune.exporter.towers.shuffle import joined_attention
from svdprune.runtime.errors import UserError

START, END = "<img>", "</img>"
_RATIO = 0.5  # default of transformers' InternVLConfig
_TAP = -1
_LEAST, _MOST = 1, 12  # defaults of its image processor
_KINDS = ("internvl_vision",)


class InternVL(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "internvl"
    model_types = ("internvl",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config, vision = checkpoint.config, _vision(checkpoint)
        image, processor = image_values(checkpoint), image_processor(checkpoint)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} keeps [CLS] among the tokens: only 'default' is supported"
            )
        size = vision["image_size"]
        if image["resize"] != {"height": size, "width": size} or image["crop"] is not None:
            raise UserError(
                f"the processor makes tiles of {image['crop'] or image['resize']} but the vision tower takes squares "
                f"of {size}: the checkpoint's processor does not belong to its model"
            )
        factor = _factor(config)
        side = size // vision["patch_size"]
        if side % factor:
            raise UserError(f"downsample_ratio 1/{factor} cannot join {side} patches a side: the config is wrong")
        joined = side // factor
        rows = (checkpoint.json("processor_config.json") or {}).get("image_seq_length", joined**2)
        if rows != joined**2:
            raise UserError(
                f"the processor gives a tile {rows} tokens (image_seq_length) but the model makes {joined**2}: the "
                "checkpoint's processor does not belong to its model"
            )
        depth_of(tap_of(config, _TAP), vision["num_hidden_layers"])
        least, most = processor.get("min_patches") or _LEAST, processor.get("max_patches") or _MOST
        # Whatever crop_to_patches says: InternVL's processor asks its image processor for tiles by itself.
        tiling = {"kind": "internvl", "tile": size, "side": joined, "least": least, "most": most} if most > 1 else None
        return VisionSpec(
            height=size,
            width=size,
            grid=(joined, joined),
            channels=vision["hidden_size"] * factor**2,
            hidden=checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
            tap=tap_of(config, _TAP),
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            tiling=tiling,
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision, tap = _vision(checkpoint), tap_of(checkpoint.config, _TAP)
        depth = depth_of(tap, vision["num_hidden_layers"])
        last_norm = tap == -1 and not vision["use_mean_pooling"]
        with torch.device("meta"):
            tower = InternVisionTower(vision, depth, last_norm, _factor(checkpoint.config))
        return filled(tower, checkpoint, TOWER)

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        channels = checkpoint.info(PROJECTOR + "layer_norm.weight").shape[0]
        hidden = checkpoint.info(PROJECTOR + "linear_2.weight").shape[0]
        with torch.device("meta"):
            projector = _NormedProjector(channels, hidden, checkpoint.config.get("projector_hidden_act", "gelu"))
        return filled(projector, checkpoint, PROJECTOR)

    def picture_text(self, checkpoint: Checkpoint) -> tuple[str, str] | None:
        """See `Family`: the picture stands between two tokens that its processor writes."""
        tokenizer = read_tokenizer(checkpoint)
        picture = tokenizer.id_to_token(image_token(checkpoint))
        start = special_token(checkpoint, "start_image_token") or START
        end = special_token(checkpoint, "end_image_token") or END
        missing = [token for token in (start, end) if tokenizer.token_to_id(token) is None]
        if picture is None or missing:
            lacking = " and ".join(missing) or "the image token"
            raise UserError(f"the tokenizer of {checkpoint.folder} lacks {lacking}: download it again")
        return picture, f"{start}{picture}{end}"

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, inner = model.config, model.model
        tap, factor = tap_of(vars(config), _TAP), _factor(vars(config))
        out = inner.vision_tower(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        tokens = (out.last_hidden_state if tap == -1 else out.hidden_states[tap])[:, 1:]
        side = round(tokens.shape[1] ** 0.5)
        joined = inner.pixel_shuffle(tokens.unflatten(1, (side, side)), scale_factor=config.downsample_ratio)
        last = (tap if tap >= 0 else len(out.hidden_states) + tap) - 1  # the layer that made hidden_states[tap]
        attention = out.attentions[last][:, :, 0, 1:].mean(1)
        return joined.flatten(1, 2), joined_attention(attention, side, factor)

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)
        return projected


class _NormedProjector(Projector):
    def __init__(self, channels: int, hidden: int, act: str):
        super().__init__(channels, hidden, act, True)
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.layer_norm(x))


def _factor(config: Mapping[str, Any]) -> int:
    """Patches of a token's side.

    Raises:
        UserError: not a whole number.
    """
    ratio = config.get("downsample_ratio", _RATIO)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1 or round(1 / ratio) != 1 / ratio:
        raise UserError(f"downsample_ratio {ratio!r} does not join whole squares of patches: it must be 1 / n")
    return round(1 / ratio)


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """The vision config, defaults filled in, sizes as single numbers.

    Raises:
        UserError: another tower, or pictures or patches that are not square.
    """
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", _KINDS[0])
    if kind not in _KINDS:
        raise UserError(f"an InternVL with a {kind!r} vision tower is not supported: only {_KINDS[0]!r} is")
    vision = {**DEFAULTS, **given}
    for name in ("image_size", "patch_size"):
        sides = {vision[name]} if isinstance(vision[name], int) else set(vision[name])
        if len(sides) != 1:
            raise UserError(f"the vision tower's {name} {vision[name]} is not square: that is not supported")
        vision[name] = sides.pop()
    return vision


FAMILY = InternVL()
