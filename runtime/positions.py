"""The picture's features put in the prompt, and the position of every row.

With one picture token at index ``p`` of the prompt, K features kept of T at ascending indices k_i:

- ``compact``: the rows are numbered 0, 1, 2, ... as if the picture had only K tokens;
- ``original``: feature i stands at p + k_i and the text after the picture goes on at p + T, as if nothing was dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Positions

POLICIES: tuple[Positions, ...] = ("compact", "original")

Embed = Callable[[Sequence[int]], np.ndarray]
"""Token ids [n] -> embeddings float32 [n, H]."""


@dataclass(frozen=True)
class Layout:
    """Where a prompt with one picture token lies among the decoder's rows.

    Attributes:
        place: index p of the picture token in the prompt.
        kept: kept indices int64 [K], ascending, of ``total`` vision tokens (T).
        policy: ``compact`` or ``original``.
    """

    place: int
    kept: np.ndarray
    total: int
    policy: Positions

    def rows(self, index: int) -> int:
        """How many decoder rows the first ``index`` ids of the prompt take."""
        return index if index <= self.place else index - 1 + len(self.kept)

    def position(self, index: int) -> int:
        """The position of the prompt's text token ``index`` (not the picture token's)."""
        if index <= self.place:
            return index
        return index - 1 + (len(self.kept) if self.policy == "compact" else self.total)

    def picture(self) -> np.ndarray:
        """Positions of the K features, int64 [K]."""
        steps = np.arange(len(self.kept), dtype=np.int64) if self.policy == "compact" else self.kept.astype(np.int64)
        return self.place + steps

    def span(self, start: int, stop: int) -> np.ndarray:
        """Positions, int64 [rows], of the prompt's ids from ``start`` to ``stop``, the picture included when inside."""
        text = [np.arange(start, min(stop, self.place), dtype=np.int64)]
        if start <= self.place < stop:
            text.append(self.picture())
        after = max(start, self.place + 1)
        if after < stop:
            text.append(self.position(after) + np.arange(stop - after, dtype=np.int64))
        return np.concatenate(text)


def policy_named(name: str) -> Positions:
    """Check the name of a policy.

    Raises:
        UserError: unknown, listing the choices.
    """
    for policy in POLICIES:
        if name == policy:
            return policy
    raise UserError(f"positions {name!r} is not known: choose one of {', '.join(POLICIES)}")


def picture_place(prompt_ids: Sequence[int], image_token_id: int) -> int:
    """Index of the prompt's one picture token.

    Raises:
        UserError: none, or more than one.
    """
    places = [index for index, token in enumerate(prompt_ids) if token == image_token_id]
    if len(places) != 1:
        problem = "no place for the picture" if not places else f"{len(places)} places for pictures"
        raise UserError(f"the prompt has {problem}, it must have one: ask about one picture, once")
    return places[0]


def splice(prompt_ids: Sequence[int], place: int, features: np.ndarray, embed: Embed) -> np.ndarray:
    """The prompt's rows with the picture's features in place of its token.

    Args:
        prompt_ids: ids [N] with the picture token at ``place``.
        features: float32 [K, H].
        embed: looks up the text's embeddings.

    Returns:
        float32 [N - 1 + K, H].
    """
    before, after = embed(prompt_ids[:place]), embed(prompt_ids[place + 1 :])
    return np.concatenate([before, features.astype(np.float32, copy=False), after])
