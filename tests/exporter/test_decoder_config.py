"""What is read from the configurations of the models that people download, in the spelling that they have there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svdprune.exporter.decoder.config import DecoderConfig, decoder_config, decoder_context
from svdprune.runtime.errors import UserError

HUB: dict[str, dict[str, Any]] = {  # as released, sizes of the tables apart
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "paligemma": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_hidden_layers": 18,
        "vocab_size": 257216,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}


def hub(name: str, **changes: Any) -> DecoderConfig:
    return decoder_config(HUB[name] | {"max_position_embeddings": 2048} | changes)


def test_released_configurations_are_read() -> None:
    qwen, newer = hub("qwen2_5_vl"), hub("qwen3_vl")
    assert qwen.axes is not None
    assert newer.axes is not None
    assert qwen.axes.tolist() == [0] * 16 + [1] * 24 + [2] * 24
    assert newer.axes.tolist() == [0, 1, 2] * 20 + [0] * 4
    assert (qwen.position_axes, qwen.qkv_bias, qwen.qk_norm) == (3, True, False)
    assert (newer.position_axes, newer.qkv_bias, newer.qk_norm) == (3, False, True)
    assert set(qwen.windows) == {None}
    pali = hub("paligemma")
    assert (pali.activation, pali.tied, pali.head_dim, pali.embed_scale) == ("gelu_tanh", True, 256, 2048**0.5)
    assert (pali.norm_offset, pali.sandwich, set(pali.windows)) == (1.0, False, {None})
    gemma = hub("gemma3")
    assert gemma.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert len(gemma.rotaries) == 2
    whole, local = gemma.rotaries[gemma.rotary_of[5]], gemma.rotaries[gemma.rotary_of[0]]
    torch.testing.assert_close(whole.cos[8, 0], torch.tensor(1.0).cos())  # positions by 8: the factor of "linear"
    torch.testing.assert_close(local.cos[1, 0], torch.tensor(1.0).cos())
    assert gemma.sandwich
    assert gemma.attention_scale is None  # that of the head size


def test_the_context_is_told_without_the_tables() -> None:
    """As PaliGemma's configuration is saved, and before anything tells that it has a prefix."""
    saved = HUB["paligemma"] | {"use_bidirectional_attention": True}
    assert decoder_context(saved) == 8192
    assert decoder_config(saved | {"max_position_embeddings": 64}, mask="prefix").mask == "prefix"
    with pytest.raises(UserError, match="cannot express this gemma model: rows that all see each other"):
        decoder_config(saved)


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert set(hub("gemma3", max_position_embeddings=1024).windows) == {None}
