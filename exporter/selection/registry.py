"""The selectors by name.

A selector is one function that says its scores in the operators of `ops`; from it come the torch module and the ONNX
graph. To add one: write the function, decorate it with `@register("name")`, import its module in `__init__`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import UserError

if TYPE_CHECKING:
    from svdprune.exporter.selection.config import SelectorConfig

Scorer = Callable[..., Any]
"""(ops, tokens (B, T, D), cls_attention (B, T) or None, task) -> scores (B, T), in values of `ops`."""


@dataclass(frozen=True)
class Task:
    """What a scorer is built for: T x D features on a grid of (rows, columns) patches, of which `keep` stay.

    `start` is the calibrated start (D, b) of `leverage`, or None for the seeded one; `grid` and `keep` may be None for
    scorers that do not use them. `padded`: some of the tokens may be rows of zeros, which must not count. `gpu`: the
    graph is for a GPU, where each kernel that waits for another costs more than its arithmetic.
    """

    config: SelectorConfig
    tokens: int
    channels: int
    grid: tuple[int, int] | None = None
    keep: int | None = None
    start: np.ndarray | None = None
    padded: bool = False
    gpu: bool = False

    def needed_keep(self) -> int:
        """K, for a scorer whose scores depend on it."""
        if self.keep is None or not 1 <= self.keep <= self.tokens:
            raise UserError(f"the selector `{self.config.name}` needs a number of kept tokens from 1 to {self.tokens}")
        return self.keep

    def needed_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches, for a scorer that places tokens in the picture."""
        if self.grid is None or self.grid[0] * self.grid[1] != self.tokens:
            raise UserError(f"the selector `{self.config.name}` needs a grid of {self.tokens} patches, not {self.grid}")
        return self.grid


@dataclass(frozen=True)
class Entry:
    """A registered selector."""

    scorer: Scorer
    needs_cls_attention: bool = False
    any_keep: bool = False  # the scores are the same for every K
    padding: bool = False  # rows of zeros do not change the scores of the others
    by_leverage: bool = False  # it begins with leverage scores, and so has their settings


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    needs_cls_attention: bool = False,
    any_keep: bool = False,
    padding: bool = False,
    by_leverage: bool = False,
) -> Callable[[Scorer], Scorer]:
    """Decorator: the scorer is known as `name` from here on.

    `any_keep` says that its scores do not depend on K, so that an evaluation computes them once for all counts;
    `padding` that rows of zeros among the tokens do not change the others' scores, given `Task.padded`; `by_leverage`
    that rank, block, iterations, centring and start are settings of it.
    """

    def add(scorer: Scorer) -> Scorer:
        _ENTRIES[name] = Entry(scorer, needs_cls_attention, any_keep, padding, by_leverage)
        return scorer

    return add


def default_selector(one_grid: bool) -> str:
    """What an export takes where no selector is named; `one_grid`: every picture's tokens lie on the same grid.

    `leverage-grid` there, which kept more answers than `leverage` where the two could be told apart, for 18 nodes more
    (docs/quality.md); `leverage` where the number of tokens varies.
    """
    return "leverage-grid" if one_grid else "leverage"


def selector_names() -> list[str]:
    """Every selector's name, in alphabetical order."""
    return sorted(_ENTRIES)


def selector_entry(name: str) -> Entry:
    """The selector called `name`; a `UserError` that lists the choices when there is none."""
    try:
        return _ENTRIES[name]
    except KeyError:
        near = difflib.get_close_matches(str(name), _ENTRIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown selector {name!r}{hint}: choose from {', '.join(selector_names())}") from None
