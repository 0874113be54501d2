"""Tiny checkpoints with random weights of PaliGemma 1 and 2 and of Gemma 3, saved with their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tools.mini_llava import text

PATCH = 14
BEGIN, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TURN, TURN_END = "<start_of_turn>", "<end_of_turn>"
HALF = [0.5, 0.5, 0.5]
# The published template of Gemma 3, without its system turn and its checks.
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One that adds its BOS itself, as Gemma's does; `special` are named tokens, as in {"boi_token": "<...>"}."""
    return PreTrainedTokenizerFast(
        tokenizer_object=text.train_tokenizer(pictures=60),
        pad_token=text.PAD,
        bos_token=text.BOS,
        eos_token=text.EOS,
        extra_special_tokens=special,
        model_max_length=2048,
    )


def _sizes(vocabulary: int, hidden: int = 48, layers: int = 2) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _vision(side: int, hidden: int = 32, **more: Any) -> dict[str, Any]:
    """SigLIP of `side` x `side` patches."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PATCH * side,
        "patch_size": PATCH,
        "vision_use_head": False,
        **more,
    }


def _spread(model: torch.nn.Module) -> None:
    """Weights that matter: as they are initialised, every token looks alike and norms do nothing.

    Embeddings stay small: they are the output's weights too, and a larger one would answer with its own token for ever.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            inputs = p.shape[0] if "mm_input" in name else p.shape[-1]
            scale = inputs**-0.5 * (0.2 if "embed_tokens" in name else 1.0)
            p.copy_(torch.randn_like(p) * scale if p.ndim > 1 else p + 0.1 * torch.randn_like(p))


def save_paligemma(folder: Path, generation: int = 1) -> Path:
    """PaliGemma on Gemma (1) or on Gemma 2 with its soft caps and windows: 6 x 6 patches."""
    torch.manual_seed(0)
    names = tokenizer()
    side = 6
    processor = PaliGemmaProcessor(
        SiglipImageProcessorPil(
            size={"height": PATCH * side, "width": PATCH * side},
            image_mean=HALF,
            image_std=HALF,
            image_seq_length=side**2,
        ),
        names,
    )
    sizes = _sizes(len(names))
    language = (
        GemmaConfig(**sizes)
        if generation == 1
        else Gemma2Config(**sizes, query_pre_attn_scalar=20, sliding_window=512, final_logit_softcapping=5.0)
    )
    config = PaliGemmaConfig(
        vision_config=_vision(side),
        text_config=language,
        image_token_index=processor.image_token_id,
        projection_dim=sizes["hidden_size"],
        hidden_size=sizes["hidden_size"],
        vocab_size=len(names),
    )
    model = PaliGemmaForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_paligemma2(folder: Path) -> Path:
    return save_paligemma(folder, 2)


def save_gemma3(folder: Path) -> Path:
    """Gemma 3: 8 x 8 patches, averaged to 4 x 4; one layer with a window and one without."""
    torch.manual_seed(0)
    names = tokenizer(boi_token=BEGIN, eoi_token=END, image_token=SOFT, turn_token=TURN, turn_end_token=TURN_END)
    side, tokens = 8, 16
    config = Gemma3Config(
        vision_config=_vision(side),
        text_config=Gemma3TextConfig(
            **_sizes(len(names)),
            query_pre_attn_scalar=20,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=tokens,
        boi_token_index=names.convert_tokens_to_ids(BEGIN),
        eoi_token_index=names.convert_tokens_to_ids(END),
        image_token_index=names.convert_tokens_to_ids(SOFT),
    )
    model = Gemma3ForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": PATCH * side, "width": PATCH * side}, image_mean=HALF, image_std=HALF),
        names,
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=tokens,
    ).save_pretrained(folder)
    return folder


def save_vision(folder: Path, name: str) -> Path:
    """A checkpoint whose vision part has the sizes of the published models, with two layers; the rest is tiny."""
    torch.manual_seed(0)
    side = {"paligemma": 16, "gemma3": 64}[name]
    vision = _vision(side, 1152, intermediate_size=4304, num_attention_heads=16)
    size = {"height": PATCH * side, "width": PATCH * side}
    model: torch.nn.Module
    if name == "gemma3":
        text = Gemma3TextConfig(**_sizes(64, 2560, 1) | {"num_attention_heads": 8})
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(vision_config=vision, text_config=text, image_token_index=3)
        )
        image: Any = Gemma3ImageProcessorPil(size=size, image_mean=HALF, image_std=HALF)
    else:
        config = PaliGemmaConfig(
            vision_config=vision, text_config=GemmaConfig(**_sizes(64)), image_token_index=3, projection_dim=2048
        )
        model = PaliGemmaForConditionalGeneration(config)
        image = SiglipImageProcessorPil(size=size, image_mean=HALF, image_std=HALF, image_seq_length=side**2)
    model.save_pretrained(folder)
    image.save_pretrained(folder)
    return folder
