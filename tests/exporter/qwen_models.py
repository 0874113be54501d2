"""Tiny checkpoints with random weights of Qwen2.5-VL and Qwen3-VL, and vision parts of their published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tools.mini_llava import text

PATCH, MERGE = 4, 2
TOKEN = PATCH * MERGE
MOST = 40  # tokens of a picture
START, PAD, END, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=text.train_tokenizer(pictures=60),
        pad_token=text.PAD,
        eos_token=text.EOS,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", START, PAD, END, VIDEO],
        model_max_length=2048,
    )


def _text(vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }


def _spread(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():  # the default initialisation is so small that every token looks alike
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p.flatten(1).shape[1] ** -0.5)
            elif "norm" in name or "ln_q" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.1 * torch.randn_like(p))


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": PAD, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _saved(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    _spread(model)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": 4 * TOKEN**2, "longest_edge": MOST * TOKEN**2},
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def save_qwen2_5(folder: Path, **changes: Any) -> Path:
    """A Qwen2.5-VL: windows of 4 x 4 tokens, the second of two layers over the whole picture."""
    tokenizer = _tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 4 * TOKEN,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 48,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=_text(len(tokenizer)) | changes, tie_word_embeddings=False, **_ids(tokenizer)
    )
    return _saved(folder, Qwen2_5_VLForConditionalGeneration(config), tokenizer)


def save_qwen3(folder: Path, **changes: Any) -> Path:
    """A Qwen3-VL: a table of 6 x 6 positions, two DeepStack levels."""
    tokenizer = _tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": 48,
    }
    config = Qwen3VLConfig(
        vision_config=vision, text_config=_text(len(tokenizer)) | changes, tie_word_embeddings=False, **_ids(tokenizer)
    )
    return _saved(folder, Qwen3VLForConditionalGeneration(config), tokenizer)


def save_vision(folder: Path, kind: str) -> Path:
    """A checkpoint whose vision part has the sizes of the published 7B or 8B model, few layers; the rest is tiny."""
    vision: dict[str, Any]
    model: Any
    text_part = {**_text(64), "num_hidden_layers": 3}
    torch.manual_seed(0)
    if kind == "qwen2_5":
        vision = {"hidden_size": 1280, "depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 3584}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text_part))
        image = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28})
    else:
        vision = {"depth": 3, "deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": 4096}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text_part))
        image = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
    model.save_pretrained(folder)
    image.save_pretrained(folder)
    return folder
