"""What comes back: a picture as the model sees it, an answer, and an answer that is still being written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from svdprune.runtime.arrays import AnyArray, fetched_on_read, held
from svdprune.runtime.positions import Span
from svdprune.runtime.tiling import View

Stopped = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class Tiled:
    """Rows of a picture in tiles: ``places`` int64 [rows] among the unpruned one's ``total``; ``views`` to draw.

    ``positions`` int64 [rows, 3] and ``advance`` are for decoders with positions of three axes: see ``Span``.
    """

    places: np.ndarray
    total: int
    views: list[View] = field(default_factory=list)
    positions: np.ndarray | None = None
    advance: int | None = None


@fetched_on_read("features")
@dataclass(frozen=True)
class Sight:
    """A picture after the vision graph: what ``Vlm.ask`` and ``Vlm.chat`` take in place of the picture, too.

    Attributes:
        features: float32 [K, H]; read, they are on the host, copied there from a GPU when first read.
        kept_indices: int64 [K], ascending, of T patches in row-major order.
        scores: float32 [T], higher is kept first.
        pixels: uint8 [height, width, 3], the preprocessed picture.
        preprocess, vision: seconds of each stage.
        tiled: where the picture was cut into tiles: what its features are rows of. K and T are this picture's, and
            ``features`` has the rows that stand between tokens, too.
        deepstack: float32 [L, rows of ``features``, H], for decoders that add such levels; None for others.
    """

    features: np.ndarray
    kept_indices: np.ndarray
    scores: np.ndarray
    pixels: np.ndarray
    preprocess: float = 0.0
    vision: float = 0.0
    tiled: Tiled | None = None
    deepstack: np.ndarray | None = None

    @property
    def features_in_place(self) -> AnyArray:
        """The features where the vision backend left them."""
        return held(self, "features")

    @property
    def places(self) -> np.ndarray:
        """int64 [rows of ``features``], ascending: which rows of the unpruned picture's they are."""
        return self.kept_indices if self.tiled is None else self.tiled.places

    @property
    def total(self) -> int:
        """Rows that the unpruned picture has in the prompt."""
        return len(self.scores) if self.tiled is None else self.tiled.total

    @property
    def span(self) -> Span:
        """The picture's rows in the prompt."""
        if self.tiled is None:
            return Span(self.kept_indices, self.total)
        return Span(self.tiled.places, self.tiled.total, self.tiled.positions, self.tiled.advance)


@dataclass(frozen=True)
class Tokens:
    """Counts: vision tokens of the whole pictures and kept, rows of the prompt (kept ones included), ids generated."""

    vision_total: int
    vision_kept: int
    prompt: int
    generated: int


@dataclass(frozen=True)
class Times:
    """Seconds. ``prefill`` runs from the question to the first token; ``decode`` has one entry for each later token.

    ``preprocess`` and ``vision`` are those of the ``Sight`` (several sum up), and 0 in later turns of a chat, where
    nothing was encoded.
    """

    preprocess: float
    vision: float
    prefill: float
    decode: list[float]

    @property
    def first_token(self) -> float:
        """Time to first token: picture and question in, first token chosen."""
        return self.preprocess + self.vision + self.prefill

    @property
    def total(self) -> float:
        """All of it."""
        return self.first_token + sum(self.decode)


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without special tokens and without the stop string.
        token_ids: every id generated, the one that ended the answer included.
        kept_indices: int64 [K]; ``scores``: float32 [T] (see ``Sight``). Of several pictures, one after the other: the
            indices of a picture's tokens follow those of the pictures before it.
        pictures: how many of ``scores`` are each picture's, in the order of the prompt.
        tokens: counts.
        times: seconds.
        stopped: ``eos`` (the model ended), ``length`` (max_new_tokens or the context) or ``stop`` (a stop string).
    """

    text: str
    token_ids: list[int]
    kept_indices: np.ndarray
    scores: np.ndarray
    tokens: Tokens
    times: Times
    stopped: Stopped
    pictures: list[int] = field(default_factory=list)


class AnswerStream(Iterator[str]):
    """Iterate for pieces of text as they become certain; then ``answer`` holds the whole.

    The pieces joined are ``answer.text``. ``close`` ends early: the answer is dropped. ``done`` tells that nothing more
    will come.
    """

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None
        self.done = False

    def __next__(self) -> str:
        for piece in self._pieces:
            if isinstance(piece, str):
                return piece
            self._answer = piece
        self.done = True
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The finished answer; what is left of the stream is generated first.

        Raises:
            RuntimeError: the stream was closed before its end.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise RuntimeError("the stream was closed before the answer was finished")
        return self._answer

    def close(self) -> None:
        """Stop generating."""
        self.done = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
