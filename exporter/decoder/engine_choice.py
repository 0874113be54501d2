"""Whether a bundle gets the graph that decoder engines are built from, and how long its KV cache is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svdprune.exporter.decoder.config import decoder_context
from svdprune.exporter.rules import DECODER_OPERATORS, releases_with
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import Release, Target

# Rows of the cache unless asked otherwise: a prompt of a few hundred tokens, the picture's, and a chat's answers.
_ROWS, _ROWS_BESIDE_PICTURE = 2048, 1024
_CHAINED = "the vision engine is chained to ONNX Runtime's decoder"
LEAST_TEXT = 64  # rows that a question with its chat template and a short answer need at the least


@dataclass(frozen=True)
class EnginePlan:
    """`cache` is the rows of the graph's KV cache, None where no graph is written; `releases` those that can build it.

    `note` is the manifest's `decoder.engine_refused`: which releases cannot use the graph or why there is none.
    """

    cache: int | None
    note: str | None
    releases: tuple[Release, ...] = ()


def plan_engine(target: Target, wanted: str, rows: int | None, text_config: dict[str, Any], keep: int) -> EnginePlan:
    """Decide from the releases of TensorRT that the target runs, before a weight is read.

    Args:
        wanted: `auto`: the graph is written when any release of the target has its operators; `none`: it is not.
        rows: of the cache; None for `default_cache`'s.
        text_config: the language model's part of `config.json`.
        keep: vision tokens of a picture.

    Raises:
        UserError: `wanted` is neither, `rows` cannot be or are given where there is no cache, or a language model
            that the decoder export does not know.
    """
    if wanted not in ("auto", "none"):
        raise UserError(f"unknown choice {wanted!r} for the decoder engine: auto or none")
    able = releases_with(target, DECODER_OPERATORS)
    lacking = [release for release in target.releases if release not in able]
    if wanted == "auto" and able:
        context = decoder_context(text_config)
        if rows is not None:
            check_cache(rows, context, keep)
        return EnginePlan(rows or default_cache(context, keep), _note(lacking) if lacking else None, able)
    note = None  # without TensorRT there is nothing to say
    if target.releases:
        note = _note(lacking) if wanted == "auto" else f"it was exported with --decoder-engine none: {_CHAINED}"
    if rows is not None:
        reason = note or f"the target {target.name} runs no TensorRT"
        raise UserError(f"--cache {rows} is for the decoder engine, and there is none ({reason}): leave it out")
    return EnginePlan(None, note)


def default_cache(context: int, keep: int) -> int:
    """Rows of the KV cache: 2048, more where the picture alone takes much of them, never above the context."""
    return min(context, max(_ROWS, keep + _ROWS_BESIDE_PICTURE))


def check_cache(cache: int, context: int, keep: int) -> None:
    """Refuse a cache that could not hold a picture with a question, or that the model has no positions for.

    Raises:
        UserError: naming the limit that it breaks.
    """
    if cache > context:
        raise UserError(
            f"a KV cache of {cache} rows is longer than the model's context: give --cache {context} or less"
        )
    if cache < keep + LEAST_TEXT:
        enough = default_cache(context, keep)
        advice = f"give --cache {enough}, or " if enough >= keep + LEAST_TEXT else ""
        raise UserError(
            f"a KV cache of {cache} rows cannot hold {keep} vision tokens with a question and its answer (at least "
            f"{LEAST_TEXT} rows): {advice}keep fewer tokens"
        )


def _note(lacking: Sequence[Release]) -> str:
    names = " and ".join(release.title for release in lacking)
    return f"{names} cannot build the decoder engine, whose {', '.join(DECODER_OPERATORS)} are newer: there {_CHAINED}"
