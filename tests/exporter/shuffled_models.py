"""Tiny checkpoints with random weights of the families that join patches by a pixel shuffle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.exporter.tiled_models import fast_tokenizer, spread, text_config
from tools.mini_llava import text

SIDE, PATCH, FACTOR = 24, 4, 2
TOKENS = (SIDE // PATCH // FACTOR) ** 2
ACROSS = 3  # tiles on the longest edge of SmolVLM
MOST = 4  # tiles of InternVL's grid
FAKE, WHOLE, CONTEXT, START, END = "<fake_token_around_image>", "<global-img>", "<IMG_CONTEXT>", "<img>", "</img>"
CELLS = [f"<row_{row}_col_{column}>" for row in range(1, ACROSS + 1) for column in range(1, ACROSS + 1)]
IMAGES = {
    "smolvlm": SmolVLMImageProcessorPil,
    "idefics3": Idefics3ImageProcessorPil,
    "internvl": GotOcr2ImageProcessorPil,
}


def save_smolvlm(folder: Path, language: str = "llama") -> Path:
    """A SmolVLM: tiles of 24 x 24, at most 3 x 3 and one more; a row and column is one token."""
    return _save_idefics(folder, language, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMVisionConfig, True)


def save_idefics3(folder: Path, language: str = "llama") -> Path:
    """An Idefics3, whose rows and columns are spelled out by several tokens."""
    return _save_idefics(
        folder, language, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig, False
    )


def _save_idefics(folder: Path, language: str, config: Any, model: Any, vision: Any, named: bool) -> Path:
    tokenizer = fast_tokenizer()
    tokenizer.add_tokens([FAKE, *([WHOLE, *CELLS] if named else [])], special_tokens=True)
    torch.manual_seed(0)
    made = model(
        config(
            vision_config=vision(**_vision()),
            text_config=text_config(language, len(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids(text.IMAGE),
            scale_factor=FACTOR,
        )
    )
    spread(made)
    made.save_pretrained(folder)
    images = IMAGES["smolvlm" if named else "idefics3"](
        size={"longest_edge": ACROSS * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    # The parts one by one, as on the hub: SmolVLM's whole processor cannot be made without torchvision, for its videos.
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(text.CHAT_TEMPLATE)
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": TOKENS}))
    return folder


def save_internvl(folder: Path, language: str = "qwen2", tap: int = -1, **vision: Any) -> Path:
    """An InternVL: up to four tiles of 24 x 24, and one more."""
    tokenizer = fast_tokenizer()
    tokenizer.add_tokens([CONTEXT, START, END], special_tokens=True)
    torch.manual_seed(0)
    sizes = {**_vision(), "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], **vision}
    made = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**sizes),
            text_config=text_config(language, len(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT),
            image_seq_length=TOKENS,
            vision_feature_layer=tap,
            tie_word_embeddings=False,
        )
    )
    spread(made)
    with torch.no_grad():  # made as zeros and ones
        for name, weight in made.model.vision_tower.named_parameters():
            if name.endswith(("token", "embeddings", "lambda_1", "lambda_2", "norm.weight")):
                weight.normal_()
    made.save_pretrained(folder)
    # The processor asks for tiles whatever its image processor says by itself.
    GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=MOST, crop_to_patches=False
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(text.CHAT_TEMPLATE.replace(text.IMAGE, CONTEXT))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": TOKENS}))
    return folder


SAVES: dict[str, Callable[..., Path]] = {"smolvlm": save_smolvlm, "internvl": save_internvl}


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


class _Pictures(InternVLProcessor):
    """InternVL's processor without its part for videos, which wants torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        return None


def inputs_of(folder: Path, prompt: str, *images: Image.Image) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a rendered prompt and its pictures."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor: Any
    if json.loads((folder / "config.json").read_text())["model_type"] == "internvl":
        for name, token in (("start", START), ("end", END), ("context", CONTEXT)):
            setattr(tokenizer, f"{name}_image_token", token)
            setattr(tokenizer, f"{name}_image_token_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.video_token = "<video>"
        processor = _Pictures(GotOcr2ImageProcessorPil.from_pretrained(folder), tokenizer, None, TOKENS)
    else:  # SmolVLM's processor writes the same prompts; it cannot be made without torchvision
        processor = Idefics3Processor(Idefics3ImageProcessorPil.from_pretrained(folder), tokenizer, TOKENS)
    made: dict[str, torch.Tensor] = processor(images=list(images), text=prompt, return_tensors="pt")
    return made


def save_vision(folder: Path, kind: str) -> Path:
    """A checkpoint whose vision part has the sizes of SmolVLM2-2.2B or InternVL3-1B, with two layers; else tiny."""
    torch.manual_seed(0)
    tokenizer = fast_tokenizer()
    tokenizer.add_tokens([FAKE, WHOLE, CONTEXT, START, END, *CELLS], special_tokens=True)
    model: torch.nn.Module
    images: Any
    if kind == "smolvlm":
        so400m = SmolVLMVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                vision_config=so400m,
                text_config=text_config("qwen2", len(tokenizer), 2048),
                image_token_id=tokenizer.convert_tokens_to_ids(text.IMAGE),
                scale_factor=3,
            )
        )
        images = SmolVLMImageProcessorPil(size={"longest_edge": 4 * 384}, max_image_size={"longest_edge": 384})
    else:
        model = InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=InternVLVisionConfig(num_hidden_layers=2, attention_bias=True),
                text_config=text_config("qwen2", len(tokenizer), 896),
                image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT),
            )
        )
        images = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448})
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
