"""A tiny LLaVA checkpoint with random weights, saved as Hugging Face saves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tools.mini_llava.text import processor, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 42 x 42 in 3 x 3 patches, three vision layers of width 32, two language layers of width 48."""
    folder = tmp_path_factory.mktemp("tiny-llava")
    tokenizer = train_tokenizer(pictures=60)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=42,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=tokenizer.token_to_id("<image>"),
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # the default initialisation is so small that every token looks alike
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor(tokenizer, image_size=42).save_pretrained(folder)
    return folder
