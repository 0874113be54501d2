"""A conversation about pictures: each encoded once, and the decoder's cache carried from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from svdprune.runtime.answer import Answer, AnswerStream, Sight, Times, Tokens
from svdprune.runtime.errors import UserError
from svdprune.runtime.generate import Generated, generate
from svdprune.runtime.options import Options
from svdprune.runtime.sampling import Sampler
from svdprune.runtime.stops import StopFilter
from svdprune.runtime.template import Message
from svdprune.runtime.text import assistant_message, user_message

if TYPE_CHECKING:
    from svdprune.runtime.prompt import Pictured
    from svdprune.runtime.vlm import Pictures, Vlm


class Chat:
    """Ask several questions in turn; ``Vlm.chat`` makes one.

    Each turn renders the whole conversation with the model's template, and only what follows the part that the cache
    already holds is computed. A template that rewrites earlier turns costs a longer prefill, never a different answer.

    Attributes:
        sights: the pictures of the first turn (of the finished turns later on), encoded.
        messages: the finished turns, as chat templates take them.
    """

    def __init__(self, vlm: Vlm, image: Pictures) -> None:
        self.sights = vlm.see_all(image)
        self.messages: list[Message] = []
        self._vlm = vlm
        self._pictures = vlm.pictured(self.sights)
        self._prompt = vlm.cached_prompt([])
        self._open: AnswerStream | None = None

    @property
    def sight(self) -> Sight:
        """The first picture."""
        return self.sights[0]

    # fmt: off
    @overload
    def ask(
        self, question: str, stream: Literal[False] = ..., max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ..., images: Pictures | None = ...,
    ) -> Answer: ...

    @overload
    def ask(
        self, question: str, stream: Literal[True], max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ..., images: Pictures | None = ...,
    ) -> AnswerStream: ...
    # fmt: on

    def ask(
        self,
        question: str,
        stream: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        images: Pictures | None = None,
    ) -> Answer | AnswerStream:
        """Ask the next question. The arguments and errors are those of ``Vlm.ask``.

        ``images`` are more pictures, which stand before this question and stay in the conversation.

        A stream must be read to its end, or closed, before the next question; a closed turn leaves no trace.
        """
        defaults = self._vlm.manifest.decoder.generation
        options = Options.of(defaults, max_new_tokens, temperature, top_p, top_k, seed, stop)
        answer = self.reply(question, options, images)
        return answer if stream else answer.answer

    def reply(self, question: str, options: Options, images: Pictures | None = None) -> AnswerStream:
        """``ask`` with settings that are checked already: prefill now, the rest as the stream is read."""
        if self._open is not None and not self._open.done:
            raise UserError("the last answer is still being written: read its stream to the end, or close it")
        vlm = self._vlm
        vlm.text.check_question(question)  # before a picture is encoded for nothing
        sights, pictures = self.sights, self._pictures
        new = [] if self.messages else list(sights)
        if images is not None:
            more = vlm.see_later(images, len(sights))
            new, sights = [*new, *more], [*sights, *more]
            pictures = [*pictures, *vlm.pictured(sights)[len(pictures) :]]
        started = time.perf_counter()
        turn = user_message(question, len(new))
        self._prompt.show(pictures)
        logits = self._prompt.advance(vlm.text.prompt_ids([*self.messages, turn]))
        prefill = time.perf_counter() - started
        self._open = AnswerStream(self._write(turn, logits, options, sights, pictures, new, prefill))
        return self._open

    def _write(
        self,
        turn: Message,
        logits: np.ndarray,
        options: Options,
        sights: list[Sight],
        pictures: list[Pictured],
        new: list[Sight],
        prefill: float,
    ) -> Iterator[str | Answer]:
        """Pieces of text, then the answer; the turn and its pictures join the conversation at the end."""
        vlm, prompt_rows = self._vlm, self._prompt.rows
        result = Generated()
        yield from generate(
            self._prompt,
            logits,
            Sampler(options.sampling),
            vlm.text.stream(),
            StopFilter(options.stop),
            frozenset(vlm.manifest.decoder.eos),
            options.max_new_tokens,
            result,
        )
        self.messages += [turn, assistant_message(result.text)]
        self.sights, self._pictures = sights, pictures
        counts = [len(sight.scores) for sight in sights]
        starts = np.cumsum([0, *counts[:-1]])
        kept = [sight.kept_indices + start for sight, start in zip(sights, starts, strict=True)]
        yield Answer(
            text=result.text,
            token_ids=result.ids,
            kept_indices=np.concatenate(kept),
            scores=np.concatenate([sight.scores for sight in sights]),
            tokens=Tokens(sum(counts), sum(map(len, kept)), prompt_rows, len(result.ids)),
            times=Times(
                preprocess=sum(sight.preprocess for sight in new),
                vision=sum(sight.vision for sight in new),
                prefill=prefill + result.seconds[0],
                decode=result.seconds[1:],
            ),
            stopped=result.stopped,
            pictures=counts,
        )
