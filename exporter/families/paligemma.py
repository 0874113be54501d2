"""PaliGemma 1 and 2: SigLIP to its end, one linear layer, a Gemma whose prompt sees itself in both directions.

Its processor builds the prompt: pictures, <bos>, the question, a line end. There is no form for a second question, nor
for an answer in the prompt, so there is no template of a chat either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.families.llava import PROJECTOR, TOWER
from svdprune.exporter.processor import image_processor, image_values
from svdprune.exporter.towers.layers import filled
from svdprune.exporter.towers.siglip import DEFAULTS, SiglipTower
from svdprune.runtime.errors import UserError

# PaliGemmaProcessor's own: <image> for each picture, then bos_token, then the question and a line end.
_TEMPLATE = """\
{%- if messages | length != 1 -%}
{{ raise_exception('PaliGemma takes one question about a picture: start a new chat for the next') }}
{%- endif -%}
{%- for part in messages[0]['content'] if part['type'] == 'image' -%}
{{ image_token }}
{%- endfor -%}
{{ bos_token }}
{%- for part in messages[0]['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endfor -%}
{{ '\\n' }}"""


class PaliGemma(Plain):
    """See `svdprune.exporter.families.base.Family`."""

    name = "paligemma"
    model_types = ("paligemma",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        vision = siglip_of(checkpoint, "PaliGemma")
        image = square_image(checkpoint, vision["image_size"])
        side = vision["image_size"] // vision["patch_size"]
        rows = image_processor(checkpoint).get("image_seq_length", side * side)
        if rows != side * side:
            raise UserError(
                f"the processor gives a picture {rows} tokens (image_seq_length) but the vision tower makes "
                f"{side * side}: the checkpoint's processor does not belong to its model"
            )
        return VisionSpec(
            height=vision["image_size"],
            width=vision["image_size"],
            grid=(side, side),
            channels=vision["hidden_size"],
            hidden=checkpoint.info(PROJECTOR + "linear.weight").shape[0],
            tap=-1,
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            cls=False,
            mask="prefix",
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        return siglip_to_its_end(checkpoint, siglip_of(checkpoint, "PaliGemma"))

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        hidden, channels = checkpoint.info(PROJECTOR + "linear.weight").shape
        with torch.device("meta"):
            projector = _Projector(channels, hidden)
        return filled(projector, checkpoint, PROJECTOR)

    def chat_template(self, checkpoint: Checkpoint) -> str | None:
        """See `Family`: the processor's form."""
        if not (checkpoint.json("tokenizer_config.json") or {}).get("bos_token"):
            raise UserError(
                f"{checkpoint.folder}/tokenizer_config.json has no bos_token, which every prompt of PaliGemma has: "
                "download it again"
            )
        return _TEMPLATE

    def reference_tokens(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return model.model.vision_tower(pixels).last_hidden_state, None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)
        return projected


class _Projector(nn.Module):
    """One layer; transformers before 5 divided by sqrt(H) after it, and multiplied inside the language model."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(channels, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def siglip_of(checkpoint: Checkpoint, family: str) -> dict[str, Any]:
    """The vision config, defaults filled in.

    Raises:
        UserError: another tower than SigLIP's.
    """
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise UserError(f"a {family} with a {kind!r} vision tower is not supported: only 'siglip_vision_model' is")
    return {**DEFAULTS, **given}


def siglip_to_its_end(checkpoint: Checkpoint, vision: dict[str, Any]) -> nn.Module:
    """The whole tower, its last norm included."""
    with torch.device("meta"):
        tower = SiglipTower(vision, vision["num_hidden_layers"], last_norm=True)
    return filled(tower, checkpoint, TOWER)


def square_image(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """`image_values`, checked to make squares of `size` pixels.

    Raises:
        UserError: the processor makes another size.
    """
    image = image_values(checkpoint)
    made = image["crop"] or image["resize"] or {}
    if made != {"height": size, "width": size}:
        raise UserError(
            f"the processor makes pictures of {made} but the vision tower takes squares of {size}: the checkpoint's "
            "processor does not belong to its model"
        )
    return image


FAMILY = PaliGemma()
