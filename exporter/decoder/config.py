"""What the decoder graph needs to know of a language model, and which models it can express.

An architecture is one line of `_ARCHITECTURES`: where it has biases and whether it normalises queries and keys. The
rest (grouped heads, RMS norms, gated SiLU) is common to all of them. What the graph cannot express is refused here,
before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from svdprune.runtime.errors import UserError

# Rotary embeddings whose frequencies are constants. "dynamic" and "longrope" change with the length of the sequence.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class _Parts:
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


_ARCHITECTURES: dict[str, Callable[[Any], _Parts]] = {
    "llama": lambda c: _Parts(c.attention_bias, c.attention_bias, c.mlp_bias),
    "mistral": lambda _: _Parts(),
    "qwen2": lambda _: _Parts(qkv_bias=True),
    "qwen3": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True),
}
SUPPORTED: tuple[str, ...] = tuple(_ARCHITECTURES)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder. `context` is the number of positions, so the rows of the rotary tables."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    eos: tuple[int, ...]
    cos: torch.Tensor  # float32 (context, head_dim / 2)
    sin: torch.Tensor  # float32 (context, head_dim / 2)


def decoder_config(text_config: dict[str, Any]) -> DecoderConfig:
    """Read the `text_config` of a checkpoint; what it leaves out has the defaults of transformers.

    Raises:
        UserError: an architecture or an option that the decoder graph does not have, or values that transformers
            refuses.
    """
    model_type = text_config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise UserError(
            f"the language model is of type {model_type!r}; the decoder export knows: {', '.join(SUPPORTED)}"
        )
    try:
        config = AutoConfig.for_model(**text_config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the text_config of config.json is not a valid {model_type} configuration: {reason}"
        ) from error
    _refuse_unsupported(config)
    parts = _ARCHITECTURES[model_type](config)
    cos, sin = _rotary_tables(config)
    eos = config.eos_token_id
    return DecoderConfig(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        qkv_bias=parts.qkv_bias,
        output_bias=parts.output_bias,
        mlp_bias=parts.mlp_bias,
        qk_norm=parts.qk_norm,
        tied=bool(config.tie_word_embeddings),
        eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        cos=cos,
        sin=sin,
    )


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse_unsupported(config: PretrainedConfig) -> None:
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    sliding = getattr(config, "sliding_window", None)
    problems = [
        (config.hidden_act not in ("silu", "swish"), f"activation {config.hidden_act!r} (it has silu)"),
        (rope_type not in _ROPE_TYPES, f"rotary scaling {rope_type!r} (it has {', '.join(_ROPE_TYPES)})"),
        ("mrope_section" in rope, "multimodal rotary positions (mrope_section)"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "a partial rotary embedding (partial_rotary_factor)"),
        (sliding is not None and sliding < config.max_position_embeddings, f"a sliding window of {sliding} tokens"),
        (config.num_attention_heads % config.num_key_value_heads != 0, "query heads not a multiple of key-value heads"),
        (_head_dim(config) % 8 != 0, f"a head size of {_head_dim(config)} (GroupQueryAttention takes multiples of 8)"),
    ]
    for present, what in problems:
        if present:
            raise UserError(f"the decoder export cannot express this {config.model_type} model: {what}")


def _rotary_tables(config: PretrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, made by transformers itself so that each entry is bit-equal to the reference's.

    The four architectures share one rotary embedding: Llama's class reads the options of any of them.
    """
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)  # (1, context, head_dim), halves equal
    half = _head_dim(config) // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
