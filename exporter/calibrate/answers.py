"""Which features are best scored: answers from the tokens that exact leverage keeps, raw or centred, at each tap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from svdprune.calib.calibration import Candidate
from svdprune.calib.evaluate.outcome import Outcome, Setting, mean_outcome
from svdprune.calib.evaluate.report import Row, summarise
from svdprune.calib.statistics import FEWEST, bootstrap_mean
from svdprune.exporter.calibrate.look import Looked
from svdprune.exporter.evaluate.judge import Judge
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.seen import Seen
from svdprune.exporter.feed import selector_for
from svdprune.exporter.selection import SelectorConfig, reference_scores
from svdprune.runtime.errors import NumericalError
from svdprune.runtime.manifest import Positions

SEEDS = 5  # orders of `random`
POSITIONS: Positions = "compact"


@dataclass(frozen=True)
class Scoring:
    """One way to score: leverage of rank `rank` at a tap (None for the checkpoint's own), raw or centred."""

    name: str
    tap: int | str | None
    centre: bool
    rank: int

    @property
    def config(self) -> SelectorConfig:
        """Of the exact scores."""
        return SelectorConfig(rank=self.rank, centre=self.centre)

    @property
    def label(self) -> str:
        """As `svdprune evaluate --selectors` takes it."""
        tap = "" if self.tap is None else f":tap={self.tap}"
        return f"leverage:rank={self.rank}{':centre' if self.centre else ''}{tap}"


def compare(
    model: Model,
    looked: Sequence[Looked],
    scorings: Sequence[Scoring],
    keep: int,
    limit: int,
    progress: Callable[[str, float | None], None],
) -> list[Candidate]:
    """Agreement with the unpruned model of every scoring, the first being the default; `random` and `grid` beside them.

    Args:
        limit: the most tokens of an answer.
    """
    judge = Judge(model, limit)
    chance = _chance(model, keep)
    found: dict[Setting, list[list[Outcome]]] = {}
    for number, picture in enumerate(looked):
        progress(f"answers about picture {number + 1} of {len(looked)}", number / len(looked))
        prompts = [model.prompt(question.text) for question in picture.questions]
        try:
            scores = [_exact(picture.seen, scoring) for scoring in scorings]
            kept = [picture.seen.choose(one, keep) for one in (*scores, *(one for _, one in chance))]
        except NumericalError as error:
            raise NumericalError(f"{picture.name}: {error}") from error
        said = judge.listen(model.whole(picture.seen), prompts)
        labels = [(s.label, 0) for s in scorings] + [key for key, _ in chance]
        views = [model.view(picture.seen, one, POSITIONS) for one in kept]
        verdicts = judge.compare(views, prompts, said, [False] * len(prompts))
        for (label, seed), line in zip(labels, verdicts, strict=True):
            runs = found.setdefault(Setting(label, keep, POSITIONS), [])
            while len(runs) <= seed:
                runs.append([])
            for reference, verdict, question in zip(said, line, picture.questions, strict=True):
                share = verdict.matched / len(reference.ids)
                runs[seed].append(Outcome(number, question.kind, None, None, float(verdict.same), share, verdict.kl))
    return _candidates(found, scorings)


def better(candidates: Sequence[Candidate], least: float = 0.0) -> Candidate:
    """The first, or the one of highest agreement among those whose difference from it is above chance."""
    sure = [one for one in candidates[1:] if one.difference is not None and one.difference[1] > least]
    return max(sure, key=lambda one: one.agreement, default=candidates[0])


def _exact(seen: Seen, scoring: Scoring) -> np.ndarray:
    """Scores (G, S) by a float64 SVD."""
    return seen.spread([reference_scores(scoring.config, matrix) for matrix in seen.matrices(scoring.tap)])


def _chance(model: Model, keep: int) -> list[tuple[tuple[str, int], np.ndarray]]:
    """((selector, seed), scores (1, S)) of the selectors that do not look: five random orders, and where tokens lie on
    one grid, that."""
    nothing = torch.zeros(1, model.spec.tokens, model.spec.channels)

    def scores(config: SelectorConfig) -> np.ndarray:
        return np.asarray(selector_for(model.spec, config, keep)(nothing).numpy())

    orders = [(("random", seed), scores(SelectorConfig("random", seed=seed))) for seed in range(SEEDS)]
    return orders if model.spec.tiling is not None else [*orders, (("grid", 0), scores(SelectorConfig("grid")))]


def _candidates(found: Mapping[Setting, list[list[Outcome]]], scorings: Sequence[Scoring]) -> list[Candidate]:
    rows: dict[str, Row] = {row.selector: row for row in summarise(found, {})}
    merged = {key.selector: [mean_outcome(runs) for runs in zip(*lists, strict=True)] for key, lists in found.items()}
    known = {scoring.label: scoring for scoring in scorings}
    first = merged[scorings[0].label]
    candidates = []
    for label, row in rows.items():
        scoring = known.get(label)
        assert row.agreement is not None and row.kl is not None and row.matched is not None
        candidates.append(
            Candidate(
                label,
                row.keep,
                row.questions,
                row.agreement.value,
                row.agreement.low,
                row.agreement.high,
                row.matched,
                row.kl.value,
                scoring.name if scoring else None,
                scoring.centre if scoring else None,
                scoring.rank if scoring else None,
                None if label == scorings[0].label else _difference(merged[label], first),
            )
        )
    return candidates


def _difference(found: Sequence[Outcome], first: Sequence[Outcome]) -> list[float] | None:
    """Mean difference of the agreement on the same questions and its 95 % interval, pictures drawn together."""
    pairs = [(a.same - b.same, a.picture) for a, b in zip(found, first, strict=True) if None not in (a.same, b.same)]  # type: ignore[operator]
    values, pictures = [value for value, _ in pairs], [picture for _, picture in pairs]
    if len(set(pictures)) < FEWEST:
        return None
    return [float(np.mean(values)), *bootstrap_mean(values, pictures)]
