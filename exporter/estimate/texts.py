"""Language models by the `model_type` of their config: one line each. To add one, give it a line in `TEXTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from svdprune.exporter.estimate.shapes import Text
from svdprune.runtime.errors import UserError


@dataclass(frozen=True)
class _Parts:
    """Where a language model has biases, whether it normalises queries and keys, and how many norms a layer has.

    `windowed`: whether its `sliding_window` is that of every layer. Where it is that of some, attention is counted as
    if none had one: so it is, for prompts no longer than the window.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    windowed: bool = True


# All are grouped-query attention with a gated MLP; what differs is here.
TEXTS: dict[str, Callable[[Any], _Parts]] = {
    "llama": lambda c: _Parts(c.attention_bias, c.attention_bias, c.mlp_bias),
    "mistral": lambda _: _Parts(),
    "qwen2": lambda _: _Parts(qkv_bias=True),
    "qwen2_5_vl_text": lambda _: _Parts(qkv_bias=True),
    "qwen3": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True),
    "qwen3_vl_text": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True),
    "gemma": lambda c: _Parts(c.attention_bias, c.attention_bias),
    "gemma2": lambda c: _Parts(c.attention_bias, c.attention_bias, norms=4, windowed=False),
    "gemma3_text": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True, norms=4, windowed=False),
}


def read_text(config: Any, tied: bool) -> Text:
    """The sizes of a language model from transformers' config object of it; `tied` as the whole model has it.

    Raises:
        UserError: a language model that is not known.
    """
    kind = config.model_type
    if kind not in TEXTS:
        raise UserError(f"the language model is of type {kind!r}; the estimate knows: {', '.join(TEXTS)}")
    parts = TEXTS[kind](config)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return Text(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        tied=tied,
        qkv_bias=parts.qkv_bias,
        output_bias=parts.output_bias,
        mlp_bias=parts.mlp_bias,
        layer_extra=(2 * head_dim if parts.qk_norm else 0) + (parts.norms - 2) * config.hidden_size,
        window=getattr(config, "sliding_window", None) if parts.windowed else None,
    )
