"""Pictures' features put in the prompt, and the position of every row.

A prompt holds one picture token for each picture. With one at index ``p`` that has K rows kept of T at ascending
indices k_i:

- ``compact``: the rows are numbered 0, 1, 2, ... as if the picture had only K tokens;
- ``original``: row i stands at p + k_i and the text after the picture goes on at p + T, as if nothing was dropped.

With several pictures, p counts what the pictures before it take. With positions of three axes (M-RoPE) a text row has
its number on all three; ``original`` keeps the (time, row, column) of every kept token, counted from where the picture
begins, and the text goes on where it did unpruned; ``compact`` numbers the kept rows as if they were text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Mask, Positions

POLICIES: tuple[Positions, ...] = ("compact", "original")

Embed = Callable[[Sequence[int]], np.ndarray]
"""Token ids [n] -> embeddings float32 [n, H]."""


@dataclass(frozen=True)
class Span:
    """The rows that one picture has in the prompt.

    Attributes:
        kept: int64 [K], ascending, the kept rows among the ``total`` of the unpruned picture (T).
        positions: int64 [K, 3], their (time, row, column) from the picture's first row on; None for one axis.
        advance: how far the text after the unpruned picture is from that row, with ``positions``.
    """

    kept: np.ndarray
    total: int
    positions: np.ndarray | None = None
    advance: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where a prompt with picture tokens lies among the decoder's rows.

    Attributes:
        places: index of each picture token in the prompt, ascending.
        spans: the rows of each of these pictures.
        policy: ``compact`` or ``original``.
        axes: of a position, 1 or 3.
        mask: which rows see later ones, see ``DecoderInfo``.

    Raises:
        ValueError: other numbers of places and spans, or three axes wanted of a picture that has one.
    """

    places: tuple[int, ...]
    spans: tuple[Span, ...]
    policy: Positions
    axes: int = 1
    mask: Mask = "causal"

    def __post_init__(self) -> None:
        if len(self.places) != len(self.spans):
            raise ValueError(f"{len(self.places)} places for {len(self.spans)} pictures")
        if self.axes == 3 and self.policy == "original":
            for span in self.spans:
                if span.positions is None or span.advance is None:
                    raise ValueError("a picture without positions of three axes, for a decoder that has them")

    @property
    def place(self) -> int:
        """Index of the only picture token."""
        (place,) = self.places
        return place

    def rows(self, index: int) -> int:
        """How many decoder rows the first ``index`` ids of the prompt take."""
        return index + sum(len(span.kept) - 1 for span in self._before(index))

    def position(self, index: int) -> int:
        """The position of the prompt's text token ``index``; for a picture token, where the picture begins."""
        return index + sum(self._advance(span) - 1 for span in self._before(index))

    def picture(self, number: int = 0) -> np.ndarray:
        """Positions of a picture's rows, int64 [K], or [3, K] with three axes."""
        span, start = self.spans[number], self.position(self.places[number])
        if self.policy == "compact":
            return self._lines(start + np.arange(len(span.kept), dtype=np.int64))
        if self.axes == 1:
            return start + span.kept.astype(np.int64)
        assert span.positions is not None  # checked when this was made
        return start + np.ascontiguousarray(span.positions.T, np.int64)

    def span(self, start: int, stop: int) -> np.ndarray:
        """Positions, int64 [rows] or [3, rows], of the prompt's ids from ``start`` to ``stop``, pictures included."""
        parts = []
        for first, last, number in self.runs(start, stop):
            if number is None:
                parts.append(self._lines(self.position(first) + np.arange(last - first, dtype=np.int64)))
            else:
                parts.append(self.picture(number))
        return np.concatenate(parts, axis=-1) if parts else self._lines(np.zeros(0, np.int64))

    def groups(self, start: int, stop: int) -> np.ndarray | None:
        """Groups of the rows of these ids, int64 [rows]; those of one group (0 or more) all see each other.

        None where every row sees only those before it. The ids are of the prompt, not of the answer.
        """
        if self.mask == "causal":
            return None
        parts = [np.zeros(0, np.int64)]
        for first, last, number in self.runs(start, stop):
            count = last - first if number is None else len(self.spans[number].kept)
            group = 0 if self.mask == "prefix" else -1 if number is None else number
            parts.append(np.full(count, group, np.int64))
        return np.concatenate(parts)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int | None]]:
        """The ids from ``start`` to ``stop`` as runs of text (first, last, None) and pictures (index, next, number)."""
        found: list[tuple[int, int, int | None]] = []
        done = start
        for number, place in enumerate(self.places):
            if start <= place < stop:
                if done < place:
                    found.append((done, place, None))
                found.append((place, place + 1, number))
                done = place + 1
        if done < stop:
            found.append((done, stop, None))
        return found

    def _before(self, index: int) -> list[Span]:
        return [span for place, span in zip(self.places, self.spans, strict=True) if place < index]

    def _advance(self, span: Span) -> int:
        if self.policy == "compact":
            return len(span.kept)
        return span.total if self.axes == 1 or span.advance is None else span.advance

    def _lines(self, numbers: np.ndarray) -> np.ndarray:
        """The same numbers on every axis."""
        return numbers if self.axes == 1 else np.tile(numbers, (self.axes, 1))


def one_picture(place: int, kept: np.ndarray, total: int, policy: Positions) -> Layout:
    """The layout of a prompt with one picture token at ``place`` and positions of one axis; see ``Span``."""
    return Layout((place,), (Span(kept, total),), policy)


def policy_named(name: str) -> Positions:
    """Check the name of a policy.

    Raises:
        UserError: unknown, listing the choices.
    """
    for policy in POLICIES:
        if name == policy:
            return policy
    raise UserError(f"positions {name!r} is not known: choose one of {', '.join(POLICIES)}")


def picture_places(prompt_ids: Sequence[int], image_token_id: int, pictures: int) -> tuple[int, ...]:
    """Indices of the prompt's picture tokens, as many as there are ``pictures``.

    Raises:
        UserError: another number of them.
    """
    places = tuple(index for index, token in enumerate(prompt_ids) if token == image_token_id)
    if len(places) != pictures:
        found = "no place" if not places else f"{len(places)} place{'s' * (len(places) > 1)}"
        given = "one picture" if pictures == 1 else f"{pictures} pictures"
        raise UserError(f"the prompt has {found} for the picture{'s' * (pictures > 1)}, {given} must be in it")
    return places


def picture_place(prompt_ids: Sequence[int], image_token_id: int) -> int:
    """Index of the prompt's one picture token.

    Raises:
        UserError: none, or more than one.
    """
    return picture_places(prompt_ids, image_token_id, 1)[0]


def splice(prompt_ids: Sequence[int], place: int, features: np.ndarray, embed: Embed) -> np.ndarray:
    """The prompt's rows with one picture's features in place of its token.

    Args:
        prompt_ids: ids [N] with the picture token at ``place``.
        features: float32 [K, H].
        embed: looks up the text's embeddings.

    Returns:
        float32 [N - 1 + K, H].
    """
    before, after = embed(prompt_ids[:place]), embed(prompt_ids[place + 1 :])
    return np.concatenate([before, features.astype(np.float32, copy=False), after])
