"""What was seen: one outcome for each question under each setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Setting:
    """One way of pruning: selector by its label, K tokens kept, position policy."""

    selector: str
    keep: int
    positions: str


@dataclass(frozen=True)
class Outcome:
    """One question under one setting.

    Attributes:
        picture: its number in the sample. kind: the question's, None where the data names none.
        score: 0 to 1 by the data's own rule; None without a label. positive: of a yes/no question, whether yes is
            right.
        same: 1 when the greedy answer is the unpruned model's, token for token. matched: share of the unpruned answer's
            tokens before the first that differs. kl: of the first token's distribution from the unpruned one, nats.
            None where no unpruned model was run.
    """

    picture: int
    kind: str | None
    score: float | None
    positive: bool | None = None
    same: float | None = None
    matched: float | None = None
    kl: float | None = None


def mean_outcome(runs: Sequence[Outcome]) -> Outcome:
    """One question under several seeds of the same setting, as one outcome."""

    def mean(name: str) -> float | None:
        values = [getattr(run, name) for run in runs]
        return None if None in values else float(np.mean(values))

    return replace(runs[0], score=mean("score"), same=mean("same"), matched=mean("matched"), kl=mean("kl"))
