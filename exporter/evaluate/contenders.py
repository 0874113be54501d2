"""What is compared: `leverage`, `random`, `leverage:rank=8:centre`, `leverage:tap=-1`, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from svdprune.exporter.families import VisionSpec
from svdprune.exporter.selection import SelectorConfig, selector_names
from svdprune.exporter.selection.registry import selector_entry
from svdprune.runtime.errors import UserError

SEEDS = 5  # orders that `random` is run with
PROJECTED = "projected"
VARIANTS = "variants"
VARIANT_NAMES = (
    "leverage:rank=4",
    "leverage:rank=8",
    "leverage:rank=32",
    "leverage:rank=64",
    "leverage:centre",
    "leverage:variance=0.9",
    "leverage:variance=0.99",
    "leverage:tap=-1",
    "leverage:tap=projected",
)
"""What `variants` stands for."""

_KINDS: dict[str, Any] = {"rank": int, "block": int, "iterations": int, "seed": int, "variance": float}


@dataclass(frozen=True)
class Contender:
    """A selector to compare.

    Attributes:
        label: as the user typed it.
        configs: one, or one a seed.
        tap: the hidden state whose features are scored, counted as the checkpoint's config counts; "projected" for the
            rows after the projector; None for the checkpoint's own. What is kept is always taken at its own.
    """

    label: str
    configs: tuple[SelectorConfig, ...]
    tap: int | str | None = None

    @property
    def any_keep(self) -> bool:
        """Whether the scores are the same for every K."""
        return selector_entry(self.configs[0].name).any_keep


def parse_contenders(names: Sequence[str], seed: int = 0) -> list[Contender]:
    """Contenders from what was typed, in order; empty: every selector there is.

    Raises:
        UserError: an unknown selector or setting, a value that does not fit, or one named twice.
    """
    wanted = [name for name in names if name] or [name for name in selector_names() if name != "none"]
    spread = [one for name in wanted for one in (VARIANT_NAMES if name == VARIANTS else (name,))]
    found = [_parse(name, seed) for name in spread]
    labels = [contender.label for contender in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"the selector {twice!r} is named twice: name it once")
    return found


def fitting(contenders: Sequence[Contender], spec: VisionSpec) -> list[Contender]:
    """Those that can score the pictures of a model: without [CLS] there is no attention of it, and where the number of
    tokens varies some selectors have no meaning."""
    entries = [(one, selector_entry(one.configs[0].name)) for one in contenders]
    return [
        one
        for one, entry in entries
        if (spec.cls or not entry.needs_cls_attention) and (spec.tiling is None or entry.padding)
    ]


def _parse(text: str, seed: int) -> Contender:
    name, *settings = text.strip().split(":")
    if name == "none":
        raise UserError("the selector `none` is the unpruned model, which is always measured: leave it out")
    given: dict[str, Any] = {}
    tap: int | str | None = None
    for setting in settings:
        key, found, value = setting.partition("=")
        if key == "tap" and found:
            tap = value if value == PROJECTED else _number(int, value, text, setting)
        elif key == "centre" and not found:
            given["centre"] = True
        elif key in _KINDS and found:
            given[key] = _number(_KINDS[key], value, text, setting)
        else:
            raise UserError(
                f"the selector {text!r} has a setting {setting!r} that is not known: "
                f"the settings are {', '.join(f'{one}=...' for one in (*_KINDS, 'tap'))} and centre"
            )
    config = SelectorConfig(name=name, **{"seed": seed, **given})
    default = SelectorConfig(name=name)
    used = {field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)}
    unused = used - set(config.manifest_fields()) - {"seed"}
    if unused:
        raise UserError(f"the selector {text!r} does not use {', '.join(sorted(unused))}: leave it out")
    several = name == "random" and "seed" not in given
    configs = tuple(replace(config, seed=seed + number) for number in range(SEEDS)) if several else (config,)
    return Contender(text.strip(), configs, tap)


def _number(kind: Any, value: str, text: str, setting: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"the selector {text!r} has {setting!r}, where a number is needed") from None
