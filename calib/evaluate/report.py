"""From outcomes to figures with their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from svdprune.calib.evaluate.outcome import Outcome, Setting, mean_outcome
from svdprune.calib.statistics import FEWEST, bootstrap_mean, f1, share_interval

UNPRUNED = "none"
CHANCE = "random"


@dataclass(frozen=True)
class Figure:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """As in `0.512 0.48-0.54`, with 2 digits for the ends."""
        return f"{self.value:.3f} {self.low:.{digits}f}-{self.high:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        accuracy: by the data's own rule, of the labelled questions; kinds: the same for each kind of question.
        f1: of the answer yes, where questions are answered by yes or no.
        agreement: share of answers that are the unpruned model's; matched: mean share of its tokens before the first
            that differs; kl: mean divergence of the first token's distribution, nats.
        above_random: accuracy (agreement without labels) less that of `random`, on the same questions; None for random,
            where it was not run, and for too few pictures to say.
        spread: lowest and highest of that figure over the seeds, where there were several.
        select_seconds: median time to choose the tokens of one picture.
    """

    selector: str
    keep: int
    positions: str
    questions: int
    accuracy: Figure | None = None
    kinds: dict[str, Figure] = field(default_factory=dict)
    f1: float | None = None
    agreement: Figure | None = None
    matched: float | None = None
    kl: Figure | None = None
    above_random: Figure | None = None
    spread: tuple[float, float] | None = None
    select_seconds: float | None = None

    @property
    def headline(self) -> Figure | None:
        """Accuracy where there are labels, otherwise agreement."""
        return self.accuracy or self.agreement


@dataclass(frozen=True)
class Report:
    """All of an evaluation. `facts`: what was run, on what, how judged, with which versions; strings, in order."""

    facts: dict[str, str]
    tokens: int
    pictures: int
    rows: list[Row]
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def labelled(self) -> bool:
        """Whether there are labels to be right about."""
        return any(row.accuracy is not None for row in self.rows)

    @property
    def metric(self) -> str:
        """What the rows are compared by."""
        return "accuracy" if self.labelled else "agreement"

    def to_json(self) -> dict[str, Any]:
        """Everything, for a script."""
        return dataclasses.asdict(self)


def summarise(
    outcomes: Mapping[Setting, Sequence[Sequence[Outcome]]],
    seconds: Mapping[Setting, Sequence[float]],
    binary: bool = False,
) -> list[Row]:
    """A row for each setting.

    Args:
        outcomes: for each setting one list a seed, all with the same questions in the same order.
        seconds: for each setting, the time each choice took.
        binary: whether an F1 score of "yes" means something.
    """
    merged = {key: [mean_outcome(runs) for runs in zip(*lists, strict=True)] for key, lists in outcomes.items()}
    rows = []
    for key, lists in outcomes.items():
        chance = merged.get(Setting(CHANCE, key.keep, key.positions))
        rows.append(_row(key, merged[key], lists, seconds.get(key, ()), chance, binary))
    return rows


def _row(
    key: Setting,
    found: list[Outcome],
    lists: Sequence[Sequence[Outcome]],
    seconds: Sequence[float],
    chance: list[Outcome] | None,
    binary: bool,
) -> Row:
    labelled = [o for o in found if o.score is not None]
    kinds: dict[str, list[Outcome]] = {}
    for one in labelled:
        if one.kind is not None:
            kinds.setdefault(one.kind, []).append(one)
    name = "score" if labelled else "same"
    per_seed = [mean for runs in lists if (mean := _mean(runs, name)) is not None]
    spread = (min(per_seed), max(per_seed)) if len(per_seed) > 1 else None
    return Row(
        selector=key.selector,
        keep=key.keep,
        positions=key.positions,
        questions=len(found),
        accuracy=_share(labelled, "score"),
        kinds={kind: figure for kind, members in kinds.items() if (figure := _share(members, "score")) is not None},
        f1=_f1(lists) if binary and labelled else None,
        agreement=_share(found, "same"),
        matched=_mean(found, "matched"),
        kl=_average(found, "kl"),
        above_random=None if chance is None or key.selector == CHANCE else _difference(found, chance, name),
        spread=spread,
        select_seconds=float(np.median(seconds)) if len(seconds) else None,
    )


def _values(found: Sequence[Outcome], name: str) -> tuple[list[float], list[int]]:
    """The values of a field and the pictures they belong to, of the outcomes that have it."""
    pairs = [(value, one.picture) for one in found if (value := getattr(one, name)) is not None]
    return [value for value, _ in pairs], [picture for _, picture in pairs]


def _mean(found: Sequence[Outcome], name: str) -> float | None:
    values, _ = _values(found, name)
    return float(np.mean(values)) if values else None


def _share(found: Sequence[Outcome], name: str) -> Figure | None:
    values, pictures = _values(found, name)
    return Figure(float(np.mean(values)), *share_interval(values, pictures)) if values else None


def _average(found: Sequence[Outcome], name: str) -> Figure | None:
    values, pictures = _values(found, name)
    return Figure(float(np.mean(values)), *bootstrap_mean(values, pictures)) if values else None


def _difference(found: Sequence[Outcome], other: Sequence[Outcome], name: str) -> Figure | None:
    """Mean of the differences on the same questions, pictures drawn together."""
    pairs = [(getattr(a, name), getattr(b, name), a.picture) for a, b in zip(found, other, strict=True)]
    both = [(a - b, picture) for a, b, picture in pairs if a is not None and b is not None]
    if len({picture for _, picture in both}) < FEWEST:
        return None
    values, pictures = [value for value, _ in both], [picture for _, picture in both]
    return Figure(float(np.mean(values)), *bootstrap_mean(values, pictures))


def _f1(lists: Sequence[Sequence[Outcome]]) -> float:
    """Mean over the seeds."""
    found = []
    for runs in lists:
        judged = [(o.score, o.positive) for o in runs if o.score is not None and o.positive is not None]
        found.append(f1([score for score, _ in judged], [positive for _, positive in judged]))
    return float(np.mean(found))
