"""LLaVA-NeXT (LLaVA-1.6): LLaVA's parts on the tiles of an enlarged picture, with a learned newline after each line."""

from __future__ import annotations

import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.anyres import anyres_spec, newline
from svdprune.exporter.families.base import VisionSpec
from svdprune.exporter.families.llava import PROJECTOR, Llava, tap_of, vision_of
from svdprune.runtime.errors import UserError

_TOWERS = ("clip_vision_model",)
# Default of transformers' LlavaNextConfig: a config.json may leave it out.
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LlavaNext(Llava):
    """See `svdprune.exporter.families.base.Family`."""

    name = "llava_next"
    model_types = ("llava_next",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config = checkpoint.config
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} keeps [CLS] among the tokens: only 'default' is supported"
            )
        hidden = checkpoint.info(PROJECTOR + "linear_2.weight").shape[0]
        return anyres_spec(checkpoint, vision_of(checkpoint, _TOWERS), hidden, tap_of(config), _PINPOINTS)

    def marks(self, checkpoint: Checkpoint) -> torch.Tensor | None:
        return newline(checkpoint)


FAMILY = LlavaNext()
