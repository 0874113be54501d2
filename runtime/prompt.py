"""One conversation in the decoder: which prompt ids its cache holds, and how to bring it to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from svdprune.runtime.arrays import AnyArray, Rows
from svdprune.runtime.decoder import Decoder
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Positions
from svdprune.runtime.positions import Embed, Layout, picture_place, splice


class CachedPrompt:
    """The decoder's cache, and the prompt ids in it with one picture token for all K features.

    Args:
        decoder: starts the state.
        embed: looks up token embeddings.
        features: float32 [K, H] of the picture, on the host or on the decoder's GPU.
        kept: int64 [K], their indices, ascending, among ``total`` vision tokens.
        policy: of positions.
        context: the most positions the decoder was made for.
        image_token_id: id of the picture token.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Embed,
        features: AnyArray,
        kept: np.ndarray,
        total: int,
        policy: Positions,
        context: int,
        image_token_id: int,
    ) -> None:
        self._state, self._capacity = decoder.start(), decoder.capacity
        self._embed, self._features = embed, features
        self._kept, self._total, self._policy = kept, total, policy
        self._context, self._image_token_id = context, image_token_id
        self._layout: Layout | None = None
        self.ids: list[int] = []

    @property
    def rows(self) -> int:
        """Rows in the cache: one for each text token and each of the K features."""
        return self._state.length

    def advance(self, ids: Sequence[int]) -> np.ndarray:
        """Bring the cache to the prompt ``ids``, computing only what follows its and their common beginning.

        Returns:
            float32 [V], the logits after the last id.

        Raises:
            UserError: no picture token or several, or the prompt is longer than the context.
        """
        layout = Layout(picture_place(ids, self._image_token_id), self._kept, self._total, self._policy)
        self._check_context(layout.position(len(ids)), layout.rows(len(ids)))
        same = min(_common(self.ids, ids), len(ids) - 1)  # the last id always runs: its logits are asked for
        if same <= layout.place:
            same = 0
        self._state.truncate(layout.rows(same))
        self.ids, self._layout = list(ids[:same]), layout
        new = ids[same:]
        embeds = self._embed(new) if same else self._spliced(new, layout.place)
        logits = self._state.append(embeds, layout.span(same, len(ids)))
        self.ids = list(ids)
        return logits

    def room(self) -> bool:
        """Whether one more token fits the context."""
        if self._layout is None or (self._capacity is not None and self.rows >= self._capacity):
            return False
        return self._layout.position(len(self.ids)) < self._context

    def push(self, token: int) -> np.ndarray:
        """Add one token after those in the cache; ``room`` must hold.

        Returns:
            float32 [V], the logits after it.
        """
        if self._layout is None:
            raise ValueError("push needs a prompt in the cache: call advance first")
        position = self._layout.position(len(self.ids))
        logits = self._state.append(self._embed([token]), np.array([position], np.int64))
        self.ids.append(token)
        return logits

    def _spliced(self, ids: Sequence[int], place: int) -> Rows:
        """The rows of a whole prompt; features on a GPU stay there, as a piece between two of text."""
        if isinstance(self._features, np.ndarray):
            return splice(ids, place, self._features, self._embed)
        pieces: list[AnyArray] = [self._embed(ids[:place]), self._features, self._embed(ids[place + 1 :])]
        return [piece for piece in pieces if len(piece)]

    def _check_context(self, needed: int, rows: int) -> None:
        if self._capacity is not None and rows > self._capacity:
            raise UserError(
                f"the prompt has {rows:,} tokens, the decoder engine's cache {self._capacity:,} rows: "
                "ask a shorter question, start a new chat, prune harder, or export with a larger --cache"
            )
        if needed <= self._context:
            return
        if self._policy == "compact":
            unit, remedy = "tokens", "prune harder"
        else:
            unit, remedy = "positions", "use compact positions"
        raise UserError(
            f"the prompt has {needed:,} {unit}, the model's context is {self._context:,}: "
            f"ask a shorter question, start a new chat, or {remedy}"
        )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))
