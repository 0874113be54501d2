"""The checkpoint that ships: it loads as any LLaVA does, and it looks at the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from svdprune.exporter.source import shipped_folder
from tools.accuracy import Model, measure


def test_it_loads_and_answers_with_transformers_alone() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(shipped_folder(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(shipped_folder())
    picture = np.full((336, 336, 3), 128, np.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    config = model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() in {"one", "two", "three", "four", "five"}


@pytest.fixture(scope="module")
def shipped() -> Model:
    return Model(shipped_folder())


def test_it_is_small_and_half_precision() -> None:
    files = [f for f in shipped_folder().iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in files}
