"""Tiny checkpoints with random weights of the families that cut pictures into tiles."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tools.mini_llava import text

SIDE, PATCH = 42, 14
TOKENS = (SIDE // PATCH) ** 2
NEXT_PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
ONEVISION_PINPOINTS = [[SIDE * i, SIDE * j] for i in (1, 2, 3) for j in (1, 2, 3)]
POOL = 4
TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def fast_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=text.train_tokenizer(pictures=60),
        pad_token=text.PAD,
        bos_token=text.BOS,
        eos_token=text.EOS,
        additional_special_tokens=[text.IMAGE, text.USER, text.ASSISTANT],
        model_max_length=2048,
    )


def text_config(kind: str, vocabulary: int, hidden: int = 48) -> object:
    return TEXTS[kind](
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        sliding_window=None,
    )


def spread(model: torch.nn.Module) -> None:
    with torch.no_grad():  # the default initialisation is so small that every token looks alike
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)


def save_next(folder: Path, language: str = "mistral") -> Path:
    """A LLaVA-NeXT: tiles of 42 x 42 in 3 x 3 patches, five grids."""
    tokenizer = fast_tokenizer()
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=text_config(language, len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(text.IMAGE),
        image_grid_pinpoints=NEXT_PINPOINTS,
    )
    model = LlavaNextForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=NEXT_PINPOINTS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=text.CHAT_TEMPLATE,
        image_token=text.IMAGE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def save_onevision(folder: Path, language: str = "qwen2") -> Path:
    """A LLaVA-OneVision: nine grids, made smaller above four tiles' tokens."""
    tokenizer = fast_tokenizer()
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=text_config(language, len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(text.IMAGE),
        image_grid_pinpoints=ONEVISION_PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{POOL}",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    # The parts one by one, as on the hub: the whole processor cannot be made without torchvision, for its videos.
    LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=ONEVISION_PINPOINTS
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(text.CHAT_TEMPLATE)
    return folder


def save_vision(folder: Path, kind: str) -> Path:
    """A checkpoint whose vision part has the sizes of the published 7B models, with two layers; the rest is tiny."""
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind == "next":
        clip = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=clip, text_config=text_config("mistral", 64, 4096), image_token_index=3)
        )
        image = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    else:
        siglip = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        )
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(vision_config=siglip, text_config=text_config("qwen2", 64, 3584), image_token_index=3)
        )
        image = LlavaOnevisionImageProcessorPil()
    model.save_pretrained(folder)
    image.save_pretrained(folder)
    return folder
