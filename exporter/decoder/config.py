"""What the decoder graph needs to know of a language model, and which models it can express.

An architecture is one line of `_ARCHITECTURES`: what sets it apart. The rest (grouped heads, RMS norms, a gated MLP,
sliding windows, the options that are numbers) is common to all of them and read from the configuration. What the graph
cannot express is refused here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from svdprune.exporter.decoder.rotary import Rotary, mrope_axes, rope_problems, rotary_tables
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Mask

Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING = "sliding_attention"


@dataclass(frozen=True)
class _Parts:
    """What an architecture has; the fields are `DecoderConfig`'s.

    mrope: how the columns of the rotary embedding are shared out to the three axes of a position.
    unread: options that its modelling code does not read, and that must therefore not be set.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mrope: Literal["concatenated", "interleaved"] | None = None
    gemma: bool = False
    sandwich: bool = False
    unread: tuple[str, ...] = ()


_GEMMA3_UNREAD = ("attn_logit_softcapping", "final_logit_softcapping")
_ARCHITECTURES: dict[str, Callable[[Any], _Parts]] = {
    "llama": lambda c: _Parts(c.attention_bias, c.attention_bias, c.mlp_bias),
    "mistral": lambda _: _Parts(),
    "qwen2": lambda _: _Parts(qkv_bias=True),
    "qwen3": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True),
    "qwen2_5_vl_text": lambda _: _Parts(qkv_bias=True, mrope="concatenated"),
    "qwen3_vl_text": lambda c: _Parts(c.attention_bias, c.attention_bias, qk_norm=True, mrope="interleaved"),
    "gemma": lambda c: _Parts(c.attention_bias, c.attention_bias, gemma=True),
    "gemma2": lambda c: _Parts(c.attention_bias, c.attention_bias, gemma=True, sandwich=True),
    "gemma3_text": lambda c: _Parts(
        c.attention_bias, c.attention_bias, qk_norm=True, gemma=True, sandwich=True, unread=_GEMMA3_UNREAD
    ),
}
SUPPORTED: tuple[str, ...] = tuple(_ARCHITECTURES)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder. `context` is the number of positions, so the rows of the rotary tables.

    Attributes:
        norm_offset: what is added to the stored weight of every RMS norm: 1 for Gemma, which stores weight - 1.
        sandwich: attention and MLP have a norm before and one after them, ahead of the residual.
        attention_scale: what the products of queries and keys are multiplied by, None for head_dim^-1/2.
        attention_softcap, logit_softcap: c of c * tanh(x / c), over those products and over the logits.
        embed_scale: what the token embeddings are multiplied by; neither the table on disk is nor the tied head.
        windows: for each layer how many of the latest rows a row sees, itself included; None for all.
        rotary_of, rotaries: which of the rotary tables each layer has.
        axes: int64 (head_dim / 2,), the axis (time, row or column) that turns each column; None for plain positions.
        deepstack: levels of features added to the hidden states after layers 0, 1 and so on.
        mask: which rows see later ones, as the manifest's `decoder.mask`.
    """

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
    activation: Activation
    norm_offset: float
    sandwich: bool
    attention_scale: float | None
    attention_softcap: float | None
    logit_softcap: float | None
    embed_scale: float
    windows: tuple[int | None, ...]
    rotary_of: tuple[int, ...]
    rotaries: tuple[Rotary, ...]
    axes: torch.Tensor | None
    deepstack: int
    mask: Mask

    @property
    def position_axes(self) -> int:
        """Numbers of a position: 1, or 3 with M-RoPE."""
        return 1 if self.axes is None else 3


def decoder_config(text_config: dict[str, Any], deepstack: int = 0, mask: Mask = "causal") -> DecoderConfig:
    """Read the `text_config` of a checkpoint; what it leaves out has the defaults of transformers.

    Args:
        text_config: the language model's part of `config.json`.
        deepstack: levels of features that the vision part gives the decoder's first layers.
        mask: which rows of a prompt see later ones.

    Raises:
        UserError: an architecture or an option that the decoder graph does not have, or values that transformers
            refuses.
    """
    config, parts = _read(text_config)
    _refuse_unsupported(config, parts, deepstack)
    if getattr(config, "use_bidirectional_attention", None) and mask != "prefix":  # PaliGemma sets it, for its prefix
        raise _refusal(config, "rows that all see each other (use_bidirectional_attention)")
    kinds = _layer_kinds(config)
    tables = rotary_tables(config, kinds)
    names, head_dim = list(tables), _head_dim(config)
    eos = getattr(config, "eos_token_id", None)  # not every text_config has one
    return DecoderConfig(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        qkv_bias=parts.qkv_bias,
        output_bias=parts.output_bias,
        mlp_bias=parts.mlp_bias,
        qk_norm=parts.qk_norm,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        activation=_ACTIVATIONS[_activation(config)],
        norm_offset=1.0 if parts.gemma else 0.0,
        sandwich=parts.sandwich,
        attention_scale=_attention_scale(config, head_dim),
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        embed_scale=config.hidden_size**0.5 if parts.gemma else 1.0,
        windows=tuple(_window(config) if kind == _SLIDING else None for kind in kinds),
        rotary_of=tuple(names.index(kind) if kind in names else 0 for kind in kinds),
        rotaries=tuple(tables.values()),
        axes=mrope_axes(config, head_dim // 2, parts.mrope) if parts.mrope else None,
        deepstack=deepstack,
        mask=mask,
    )


def decoder_context(text_config: dict[str, Any]) -> int:
    """Positions that the model was made for: `decoder_config`'s, without the tables, and what it raises."""
    config, parts = _read(text_config)
    _refuse_unsupported(config, parts, 0)
    return int(config.max_position_embeddings)


def _read(text_config: dict[str, Any]) -> tuple[Any, _Parts]:
    """The configuration as transformers understands it, and what its architecture has."""
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
    return config, _ARCHITECTURES[model_type](config)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _activation(config: PretrainedConfig) -> str:
    """Gemma 2 and 3 have their own name for it."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _attention_scale(config: PretrainedConfig, head_dim: int) -> float | None:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return None if scalar is None or scalar == head_dim else float(scalar) ** -0.5


def _window(config: PretrainedConfig) -> int | None:
    """The sliding window, where it is shorter than the context and so makes a difference."""
    window = getattr(config, "sliding_window", None)
    return None if window is None or window >= config.max_position_embeddings else int(window)


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    """What each layer attends to; an architecture without `layer_types` has the same in all of them."""
    alike = "full_attention" if getattr(config, "sliding_window", None) is None else _SLIDING
    return list(getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers)


def _refuse_unsupported(config: PretrainedConfig, parts: _Parts, deepstack: int) -> None:
    size, kinds = _head_dim(config), _layer_kinds(config)
    other = sorted(set(kinds) - {"full_attention", _SLIDING})
    problems = [
        (_activation(config) not in _ACTIVATIONS, f"activation {_activation(config)!r} (it has silu and tanh GELU)"),
        *rope_problems(config, size // 2, parts.mrope),
        (bool(other), f"layers of the kind {', '.join(other)}"),
        (len(kinds) != config.num_hidden_layers, f"{len(kinds)} layer_types for {config.num_hidden_layers} layers"),
        (config.num_attention_heads % config.num_key_value_heads != 0, "query heads not a multiple of key-value heads"),
        (size % 8 != 0, f"a head size of {size} (GroupQueryAttention takes multiples of 8)"),
        (deepstack > config.num_hidden_layers, f"{deepstack} levels of DeepStack features for fewer layers"),
        *((bool(getattr(config, name, None)), f"{name}, which transformers does not read") for name in parts.unread),
    ]
    for present, what in problems:
        if present:
            raise _refusal(config, what)


def _refusal(config: PretrainedConfig, what: str) -> UserError:
    return UserError(f"the decoder export cannot express this {config.model_type} model: {what}")
