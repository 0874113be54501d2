"""Configurations of the newer families' language models: small, small but for the heads, and as wide as the models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    PretrainedConfig,
    Qwen2_5_VLTextConfig,
    Qwen3VLTextConfig,
)

from tests.exporter.decoder_models import SIZES

WINDOW = 6
MROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40}
QWEN3_VL = {"rope_parameters": MROPE | {"mrope_section": [6, 3, 3]}, "head_dim": 24}
GEMMA2 = SIZES | {"num_hidden_layers": 3, "head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": WINDOW}
GEMMA3 = SIZES | {"num_hidden_layers": 3, "head_dim": 24, "sliding_window": WINDOW, "sliding_window_pattern": 2}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@dataclass(frozen=True)
class Text:
    """A language model, and the arguments of its export."""

    config: PretrainedConfig
    export: dict[str, Any] = field(default_factory=dict)


MODELS: dict[str, Text] = {
    "qwen2_5_vl": Text(Qwen2_5_VLTextConfig(**SIZES, rope_parameters=MROPE | {"mrope_section": [2, 3, 3]})),
    "qwen2_5_vl-yarn": Text(Qwen2_5_VLTextConfig(**SIZES, rope_parameters=YARN | {"mrope_section": [4, 2, 2]})),
    "qwen3_vl": Text(Qwen3VLTextConfig(**SIZES, **QWEN3_VL), {"deepstack": 2}),  # a level on the last layer, too
    "qwen3_vl-one-level": Text(Qwen3VLTextConfig(**SIZES, **QWEN3_VL), {"deepstack": 1}),
    "gemma": Text(GemmaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=24), {"mask": "prefix"}),
    "gemma2": Text(Gemma2Config(**GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0), {"mask": "prefix"}),
    "gemma3": Text(Gemma3TextConfig(**GEMMA3, query_pre_attn_scalar=40, rope_scaling=LINEAR), {"mask": "picture"}),
}

# The head sizes, heads to a key-value head and options of the models themselves; narrow and of a few layers.
SMALL: dict[str, Any] = SIZES | {"hidden_size": 256, "rms_norm_eps": 1e-6}
QWEN_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA_HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 24,
}
TRUE: dict[str, Text] = {
    "qwen2_5_vl": Text(
        Qwen2_5_VLTextConfig(**SMALL | QWEN_HEADS, rope_parameters=MROPE | {"mrope_section": [16, 24, 24]})
    ),
    "qwen3_vl": Text(
        Qwen3VLTextConfig(**SMALL | QWEN_HEADS, head_dim=128, rope_parameters=MROPE | {"mrope_section": [24, 20, 20]}),
        {"deepstack": 1},
    ),
    "gemma": Text(
        GemmaConfig(**SMALL | {"num_attention_heads": 8, "num_key_value_heads": 1}, head_dim=256), {"mask": "prefix"}
    ),
    "gemma2": Text(Gemma2Config(**SMALL | GEMMA_HEADS), {"mask": "prefix"}),
    "gemma3": Text(
        Gemma3TextConfig(**SMALL | GEMMA_HEADS, sliding_window_pattern=2, rope_scaling=LINEAR), {"mask": "picture"}
    ),
}

# Two layers as wide as the models named; the vocabulary is cut, as a head is a matrix product like any other.
CUT: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 4096, "max_position_embeddings": 4096}
WIDE: dict[str, Any] = CUT | {"hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128}
GEMMA_WIDE: dict[str, Any] = CUT | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
REAL: dict[str, Text] = {
    "Qwen2.5-VL-3B": Text(
        Qwen2_5_VLTextConfig(
            **CUT,
            hidden_size=2048,
            intermediate_size=11008,
            num_attention_heads=16,
            num_key_value_heads=2,
            rope_parameters=MROPE | {"mrope_section": [16, 24, 24]},
        )
    ),
    "Qwen3-VL-2B": Text(
        Qwen3VLTextConfig(
            **WIDE,
            intermediate_size=6144,
            num_key_value_heads=8,
            rope_parameters=MROPE | {"mrope_section": [24, 20, 20]},
        ),
        {"deepstack": 2},
    ),
    "PaliGemma-3B": Text(
        GemmaConfig(**GEMMA_WIDE | {"num_key_value_heads": 1}, hidden_size=2048, intermediate_size=16384),
        {"mask": "prefix"},
    ),
    "PaliGemma2-3B": Text(Gemma2Config(**GEMMA_WIDE, hidden_size=2304, intermediate_size=9216), {"mask": "prefix"}),
    "Gemma3-4B": Text(
        Gemma3TextConfig(
            **GEMMA_WIDE,
            hidden_size=2560,
            intermediate_size=10240,
            sliding_window=1024,
            sliding_window_pattern=2,
            rope_scaling=LINEAR,
        ),
        {"mask": "picture"},
    ),
}
