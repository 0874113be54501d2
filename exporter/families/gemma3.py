"""Gemma 3: SigLIP to its end, squares of patches averaged, a norm and a matrix; a picture's rows see each other.

The averages are the tokens that the prompt would hold, so they are what is chosen from; the norm and the matrix work
row by row and follow on the kept ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.families.llava import PROJECTOR
from svdprune.exporter.families.paligemma import siglip_of, siglip_to_its_end, square_image
from svdprune.exporter.processor import image_processor, image_token, read_tokenizer
from svdprune.exporter.towers.layers import filled
from svdprune.runtime.errors import UserError

WEIGHT = PROJECTOR + "mm_input_projection_weight"
# Defaults of transformers' Gemma3Config: a config.json may leave these out.
_TOKENS, _BEGIN, _END = 256, 255_999, 256_000


class Gemma3(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "gemma3"
    model_types = ("gemma3",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        vision = siglip_of(checkpoint, "Gemma 3")
        image = square_image(checkpoint, vision["image_size"])
        if image_processor(checkpoint).get("do_pan_and_scan"):
            raise UserError(
                "the processor cuts long pictures into crops (do_pan_and_scan), which is not supported: set it to "
                "false in preprocessor_config.json, which is transformers' default"
            )
        side = _side(checkpoint, vision)
        return VisionSpec(
            height=vision["image_size"],
            width=vision["image_size"],
            grid=(side, side),
            channels=vision["hidden_size"],
            hidden=checkpoint.info(WEIGHT).shape[1],
            tap=-1,
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            cls=False,
            mask="picture",
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision = siglip_of(checkpoint, "Gemma 3")
        patches = vision["image_size"] // vision["patch_size"]
        return _Pooled(siglip_to_its_end(checkpoint, vision), patches, patches // _side(checkpoint, vision))

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        channels, hidden = checkpoint.info(WEIGHT).shape
        with torch.device("meta"):
            projector = _Projector(channels, hidden, siglip_of(checkpoint, "Gemma 3")["layer_norm_eps"])
        return filled(projector, checkpoint, PROJECTOR)

    def picture_text(self, checkpoint: Checkpoint) -> tuple[str, str] | None:
        """See `Family`: the template writes the token that begins a picture, the processor what stands around it."""
        tokenizer, config = read_tokenizer(checkpoint), checkpoint.config
        begin = config.get("boi_token_index", _BEGIN)
        tokens: list[str] = []
        for number in (begin, image_token(checkpoint), config.get("eoi_token_index", _END)):
            token = tokenizer.id_to_token(number)
            if token is None:
                raise UserError(
                    f"the tokenizer of {checkpoint.folder} has no token {number}, which config.json gives to pictures"
                )
            tokens.append(token)
        return tokens[0], f"\n\n{''.join(tokens)}\n\n"

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens, projector = model.model.vision_tower(pixels).last_hidden_state, model.model.multi_modal_projector
        sides = (projector.patches_per_image,) * 2
        return projector.avg_pool(tokens.transpose(1, 2).unflatten(2, sides)).flatten(2).transpose(1, 2), None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projector = model.model.multi_modal_projector
        projected: torch.Tensor = projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight
        return projected


class _Pooled(nn.Module):
    """The tower, and the average of each square of `cell` x `cell` of its `patches` x `patches` patches."""

    def __init__(self, tower: nn.Module, patches: int, cell: int):
        super().__init__()
        self.tower, self.patches, self.pool = tower, patches, nn.AvgPool2d(cell)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, 3, height, width) -> tokens (B, T, D), and no [CLS] attention."""
        tokens, _ = self.tower(pixels)
        grid = tokens.transpose(1, 2).unflatten(2, (self.patches, self.patches))  # (B, D, rows, columns)
        return self.pool(grid).flatten(2).transpose(1, 2), None


class _Norm(nn.Module):
    """Gemma's: the weight is added to one, and all of it is float32."""

    def __init__(self, channels: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(channels)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class _Projector(nn.Module):
    def __init__(self, channels: int, hidden: int, epsilon: float):
        super().__init__()
        self.mm_soft_emb_norm = _Norm(channels, epsilon)
        self.mm_input_projection_weight = nn.Parameter(torch.empty(channels, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mm_soft_emb_norm(x) @ self.mm_input_projection_weight


def _side(checkpoint: Checkpoint, vision: dict[str, Any]) -> int:
    """Averages in a row of the picture.

    Raises:
        UserError: the patches do not make so many squares.
    """
    count = checkpoint.config.get("mm_tokens_per_image", _TOKENS)
    patches, side = vision["image_size"] // vision["patch_size"], math.isqrt(count)
    if side * side != count or side < 1 or patches % side:
        raise UserError(
            f"mm_tokens_per_image {count} does not divide {patches} x {patches} patches into squares: the config does "
            "not fit itself"
        )
    return side


FAMILY = Gemma3()
