"""One conversation in the decoder: which prompt ids its cache holds, and how to bring it to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svdprune.runtime.arrays import AnyArray, Rows
from svdprune.runtime.decoder import Decoder
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderInfo, Positions
from svdprune.runtime.positions import Embed, Layout, Span, picture_places


@dataclass(frozen=True)
class Pictured:
    """One picture of a prompt.

    Attributes:
        span: its rows' places.
        features: float32 [K, H], on the host or on the decoder's GPU.
        deepstack: float32 [L, K, H], what is added to these rows after the first L layers; None for nothing.
    """

    span: Span
    features: AnyArray
    deepstack: np.ndarray | None = None


@dataclass(frozen=True)
class Run:
    """Rows for ``DecoderState.append``, whose arguments the attributes are."""

    embeds: Rows
    positions: np.ndarray
    deepstack: np.ndarray | None = None
    groups: np.ndarray | None = None


def layout_of(
    ids: Sequence[int], pictures: Sequence[Pictured], policy: Positions, info: DecoderInfo, image_token_id: int
) -> Layout:
    """The layout of a prompt about ``pictures``.

    Raises:
        UserError: it has another number of picture tokens.
    """
    places = picture_places(ids, image_token_id, len(pictures))
    return Layout(places, tuple(picture.span for picture in pictures), policy, info.position_axes, info.mask)


def run_of(layout: Layout, ids: Sequence[int], start: int, pictures: Sequence[Pictured], embed: Embed) -> Run:
    """The rows of a prompt's ids from ``start`` on; features on a GPU stay there, as pieces between those of text."""
    stop = len(ids)
    positions = layout.span(start, stop)
    pieces: list[AnyArray] = []
    deepstack: np.ndarray | None = None
    row = 0
    for first, last, number in layout.runs(start, stop):
        if number is None:
            pieces.append(embed(ids[first:last]))
            row += last - first
            continue
        picture = pictures[number]
        count = len(picture.features)
        if picture.deepstack is not None:
            if deepstack is None:
                levels, _, hidden = picture.deepstack.shape
                deepstack = np.zeros((levels, positions.shape[-1], hidden), np.float32)
            deepstack[:, row : row + count] = picture.deepstack
        if count:
            pieces.append(picture.features)
        row += count
    on_host = [piece.astype(np.float32, copy=False) for piece in pieces if isinstance(piece, np.ndarray)]
    embeds: Rows = np.concatenate(on_host) if len(on_host) == len(pieces) else pieces
    return Run(embeds, positions, deepstack, layout.groups(start, stop))


class CachedPrompt:
    """The decoder's cache, and the prompt ids in it with one picture token for all rows of a picture.

    Args:
        decoder: starts the state.
        embed: looks up token embeddings.
        pictures: of the prompt, in its order; ``show`` gives others.
        policy: of positions.
        info: the manifest's ``decoder``.
        image_token_id: id of the picture token.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Embed,
        pictures: Sequence[Pictured],
        policy: Positions,
        info: DecoderInfo,
        image_token_id: int,
    ) -> None:
        self._state, self._capacity = decoder.start(), decoder.capacity
        self._embed, self._pictures = embed, list(pictures)
        self._policy, self._info, self._image_token_id = policy, info, image_token_id
        self._layout: Layout | None = None
        self.ids: list[int] = []

    @property
    def rows(self) -> int:
        """Rows in the cache: one for each text token and each of the pictures' features."""
        return self._state.length

    def show(self, pictures: Sequence[Pictured]) -> None:
        """Other pictures for later prompts. What the cache holds stays up to the first that is another object."""
        same = 0
        while same < min(len(pictures), len(self._pictures)) and pictures[same] is self._pictures[same]:
            same += 1
        if self._layout is not None and same < len(self._layout.places):
            self.ids = self.ids[: self._layout.places[same]]
        self._pictures = list(pictures)

    def advance(self, ids: Sequence[int]) -> np.ndarray:
        """Bring the cache to the prompt ``ids``, computing only what follows its and their common beginning.

        Returns:
            float32 [V], the logits after the last id.

        Raises:
            UserError: other numbers of picture tokens and pictures, or the prompt is longer than the context.
        """
        layout = layout_of(ids, self._pictures, self._policy, self._info, self._image_token_id)
        self._check_context(layout.position(len(ids)), layout.rows(len(ids)))
        same = min(_common(self.ids, ids), len(ids) - 1)  # the last id always runs: its logits are asked for
        if layout.mask == "prefix":  # every row of a prompt sees all others: another prompt changes them all
            same = 0
        self._state.truncate(layout.rows(same))
        self.ids, self._layout = list(ids[:same]), layout
        run = run_of(layout, ids, same, self._pictures, self._embed)
        logits = self._state.append(run.embeds, run.positions, run.deepstack, run.groups)
        self.ids = list(ids)
        return logits

    def room(self) -> bool:
        """Whether one more token fits the context."""
        if self._layout is None or (self._capacity is not None and self.rows >= self._capacity):
            return False
        return self._layout.position(len(self.ids)) < self._info.context

    def push(self, token: int) -> np.ndarray:
        """Add one token after those in the cache; ``room`` must hold.

        Returns:
            float32 [V], the logits after it.
        """
        if self._layout is None:
            raise ValueError("push needs a prompt in the cache: call advance first")
        count = len(self.ids)
        logits = self._state.append(self._embed([token]), self._layout.span(count, count + 1))
        self.ids.append(token)
        return logits

    def _check_context(self, needed: int, rows: int) -> None:
        context = self._info.context
        if self._capacity is not None and rows > self._capacity:
            raise UserError(
                f"the prompt has {rows:,} tokens, the decoder engine's cache {self._capacity:,} rows: "
                "ask a shorter question, start a new chat, prune harder, or export with a larger --cache"
            )
        if needed <= context:
            return
        if self._policy == "compact":
            unit, remedy = "tokens", "prune harder"
        else:
            unit, remedy = "positions", "use compact positions"
        raise UserError(
            f"the prompt has {needed:,} {unit}, the model's context is {context:,}: "
            f"ask a shorter question, start a new chat, or {remedy}"
        )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))
