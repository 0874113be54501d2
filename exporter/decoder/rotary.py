"""Rotary embeddings of a language model: tables of cos and sin, and which axis of a position turns which columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PretrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Spread = Literal["concatenated", "interleaved"]
# Frequencies that are constants. "dynamic" and "longrope" change with the length of the sequence.
_TYPES = ("default", "linear", "llama3", "yarn")
_AXES = 3  # of a position with M-RoPE: time, row, column


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position: float32 (context, head_dim / 2) each."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(config: PretrainedConfig, kinds: Sequence[str]) -> dict[str, Rotary]:
    """The tables of a valid configuration, by the kind of layer that has them; one entry where all layers share it.

    They are made by transformers itself, so that each entry is bit-equal to the reference's. Where the kinds of layers
    have frequencies of their own, that is Gemma 3's class; Llama's reads the options of all other architectures.
    """
    if not _by_kind(config):
        return {kinds[0]: _table(LlamaRotaryEmbedding(config), config)}
    rotary = Gemma3RotaryEmbedding(config)
    return {kind: _table(rotary, config, kind) for kind in sorted(set(kinds))}


def _table(rotary: Any, config: PretrainedConfig, *kind: str) -> Rotary:
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions, *kind)  # (1, context, head_dim), halves equal
    half = cos.shape[-1] // 2
    return Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def mrope_axes(config: PretrainedConfig, columns: int, spread: Spread) -> torch.Tensor:
    """Which axis turns each of the columns of a valid configuration: int64 (columns,).

    concatenated: `mrope_section[0]` columns of time, then of rows, then of columns, and so on in turn (Qwen2.5-VL).
    interleaved: time, row, column, time, row, ... until the sections of row and column are full, then time (Qwen3-VL).
    """
    sections = config.rope_parameters["mrope_section"]
    if spread == "concatenated":
        return torch.tensor([i % _AXES for i, size in enumerate(sections) for _ in range(size)])
    axes = torch.zeros(columns, dtype=torch.int64)
    for axis in range(1, _AXES):
        axes[axis : sections[axis] * _AXES : _AXES] = axis
    return axes


def rope_problems(config: PretrainedConfig, columns: int, spread: Spread | None) -> list[tuple[bool, str]]:
    """What the graph cannot express, each with whether this configuration has it."""
    found: list[tuple[bool, str]] = []
    options = config.rope_parameters or {}
    for rope in [value for value in options.values() if isinstance(value, dict)] or [options]:
        kind = rope.get("rope_type", "default")
        found += [
            (kind not in _TYPES, f"rotary scaling {kind!r} (it has {', '.join(_TYPES)})"),
            (rope.get("partial_rotary_factor", 1.0) != 1.0, "a partial rotary embedding (partial_rotary_factor)"),
        ]
    sections = options.get("mrope_section")
    if spread is None:
        return [*found, (sections is not None, "multimodal rotary positions (mrope_section)")]
    wrong = sections is None or len(sections) < _AXES or min(sections) < 0 or sum(sections) != columns
    return [*found, (wrong, f"mrope_section {sections}, which must share out {columns} columns to three axes")]


def _by_kind(config: PretrainedConfig) -> bool:
    """Whether each kind of layer has rotary options of its own."""
    return any(isinstance(value, dict) for value in (config.rope_parameters or {}).values())
