"""The decode loop: choose a token, hand out its text, put it in the cache, until something ends the answer."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from svdprune.runtime.answer import Stopped
from svdprune.runtime.prompt import CachedPrompt
from svdprune.runtime.sampling import Sampler
from svdprune.runtime.stops import StopFilter
from svdprune.runtime.text import StreamDecoder


@dataclass
class Generated:
    """Filled in while ``generate`` runs.

    Attributes:
        text: pieces handed out so far, joined.
        ids: every id chosen.
        seconds: for each token from the first, from its logits being asked for to its text being known; the first
            holds only the choosing, since its logits come from the prefill.
        stopped: why, known at the end.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: Stopped = "length"


def generate(
    prompt: CachedPrompt,
    logits: np.ndarray,
    sampler: Sampler,
    stream: StreamDecoder,
    stops: StopFilter,
    eos: Collection[int],
    max_new_tokens: int,
    result: Generated,
) -> Iterator[str]:
    """Yield the answer's text in pieces, without whitespace before its first word, and fill in ``result``.

    Args:
        prompt: the cache, brought to the prompt.
        logits: float32 [V] after the prompt.
        sampler: chooses.
        stream: a fresh detokenizer.
        stops: a fresh stop filter.
        eos: ids that end the answer.
        max_new_tokens: 1 or more.
        result: filled in as tokens come.
    """
    started = time.perf_counter()
    while True:
        token = sampler.pick(logits)
        result.ids.append(token)
        ended = token in eos
        piece = stops.push(stream.finish() if ended else stream.push(token))
        full = len(result.ids) >= max_new_tokens or not prompt.room()
        if full and not (ended or stops.hit):
            piece += stops.push(stream.finish())
        over = ended or full or stops.hit
        if over and not stops.hit:
            piece += stops.finish()
        if not result.text:  # many vocabularies put the space before a word into its token: the answer has none there
            piece = piece.lstrip()
        result.text += piece
        result.seconds.append(time.perf_counter() - started)
        if over:
            result.stopped = "stop" if stops.hit else "eos" if ended else "length"
        if piece:
            yield piece
        if over:
            return
        started = time.perf_counter()  # the caller's time between pieces is not ours
        logits = prompt.push(token)
