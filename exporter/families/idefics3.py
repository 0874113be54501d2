"""Idefics3 and SmolVLM: SigLIP on the tiles of an enlarged picture, pixel shuffle, one linear layer, marks around them.

The pixel shuffle joins squares of patches before the selection: what is kept or dropped are tokens of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.processor import image_processor, image_token, image_values, read_tokenizer, special_token
from svdprune.exporter.towers.idefics3 import DEFAULTS, Idefics3Tower
from svdprune.exporter.towers.layers import filled
from svdprune.runtime.errors import UserError
from svdprune.runtime.tiling.idefics3 import Idefics3 as Tiles

TOWER, PROJECTOR = "model.vision_tower.", "model.connector.modality_projection."
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
_KINDS = ("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm")  # of the vision config, as releases wrote it
_SCALE = 2  # default of transformers' configs


class Idefics3(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "idefics3"
    model_types = ("idefics3", "smolvlm")

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        image, processor, vision = image_values(checkpoint), image_processor(checkpoint), _vision(checkpoint)
        tile, side, factor = _tile(checkpoint)
        longest = (processor.get("size") or {}).get("longest_edge")
        if not isinstance(longest, int) or "resample" not in processor or not processor.get("do_resize", True):
            raise UserError(
                f"the image processor of {checkpoint.folder} does not say size.longest_edge and resample, or does not "
                "resize: pictures would make tiles without limit; set them as in the published model"
            )
        joined = side // factor
        rows = (checkpoint.json("processor_config.json") or {}).get("image_seq_len", joined**2)
        if rows != joined**2:
            raise UserError(
                f"the processor gives a tile {rows} tokens (image_seq_len) but the model makes {joined**2} of "
                f"{tile} pixels: the checkpoint's processor does not belong to its model"
            )
        return VisionSpec(
            height=tile,
            width=tile,
            grid=(joined, joined),
            channels=vision["hidden_size"] * factor**2,
            hidden=checkpoint.info(PROJECTOR + "proj.weight").shape[0],
            tap=-1,
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            tiling=_tiling(checkpoint, tile, joined, longest, bool(processor.get("do_image_splitting", True))),
            cls=False,
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        _, side, factor = _tile(checkpoint)
        with torch.device("meta"):
            tower = Idefics3Tower(_vision(checkpoint), side, factor)
        filled(tower, checkpoint, TOWER)
        tower.place()
        return tower

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        hidden, channels = checkpoint.info(PROJECTOR + "proj.weight").shape
        with torch.device("meta"):
            projector = _Projector(channels, hidden)
        return filled(projector, checkpoint, PROJECTOR)

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens = model.model.vision_model(pixel_values=pixels).last_hidden_state
        return model.model.connector.pixel_shuffle(tokens, model.config.scale_factor), None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.connector.modality_projection(rows)
        return projected


class _Projector(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """The vision config, defaults filled in."""
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", _KINDS[0])
    if kind not in _KINDS:
        raise UserError(f"an Idefics3 or SmolVLM with a {kind!r} vision tower is not supported")
    return {**DEFAULTS, **given}


def _tile(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Pixels and patches of a tile's side, and the patches of a token's side.

    Raises:
        UserError: sizes that do not fit together.
    """
    vision = _vision(checkpoint)
    patch, trained = vision["patch_size"], vision["image_size"]
    factor = checkpoint.config.get("scale_factor", _SCALE)
    tile = (image_processor(checkpoint).get("max_image_size") or {}).get("longest_edge", trained)
    if not all(isinstance(size, int) for size in (patch, trained, factor, tile)):
        raise UserError(f"the sizes of {checkpoint.folder} are not whole numbers: only square pictures are supported")
    side = tile // patch
    if side < 1 or side % factor:
        raise UserError(
            f"a tile of {tile} pixels has {side} patches a side, which scale_factor {factor} cannot join: the "
            "checkpoint's processor does not belong to its model"
        )
    return tile, side, factor


def _tiling(checkpoint: Checkpoint, tile: int, side: int, longest: int, split: bool) -> dict[str, Any]:
    """The settings of the tiling, with the ids of what the processor writes around the tiles.

    Raises:
        UserError: the tokenizer lacks the token that stands around pictures.
    """
    tokenizer = read_tokenizer(checkpoint)
    picture = tokenizer.id_to_token(image_token(checkpoint))
    fake = special_token(checkpoint, "fake_image_token") or FAKE
    whole = special_token(checkpoint, "global_image_token") or GLOBAL
    if picture is None or tokenizer.token_to_id(fake) is None:
        raise UserError(f"the tokenizer of {checkpoint.folder} lacks {fake} or the image token: download it again")

    def ids(text: str) -> list[int]:
        """Between two pictures, as it stands in a prompt."""
        return list(tokenizer.encode(f"{picture}{text}{picture}", add_special_tokens=False).ids[1:-1])

    settings: dict[str, Any] = {
        "tile": tile,
        "side": side,
        "longest": longest,
        "split": split,
        "cells": [],
        "line": ids("\n"),
        "whole": ids(f"\n\n{fake}{whole}"),
        "alone": ids(fake + whole),
        "end": ids(fake),
    }
    across = Tiles(**settings).across if split else 0
    lines = range(1, across + 1 if across > 1 else 1)
    settings["cells"] = [[ids(f"{fake}<row_{row}_col_{column}>") for column in lines] for row in lines]
    return {"kind": "idefics3", **settings}


FAMILY = Idefics3()
