"""A conversation about one picture: encoded once, and the decoder's cache carried from turn to turn."""

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
    from svdprune.runtime.preprocess import ImageSource
    from svdprune.runtime.vlm import Vlm


class Chat:
    """Ask several questions in turn; ``Vlm.chat`` makes one.

    Each turn renders the whole conversation with the model's template, and only what follows the part that the cache
    already holds is computed. A template that rewrites earlier turns costs a longer prefill, never a different answer.

    Attributes:
        sight: the picture, encoded.
        messages: the finished turns, as chat templates take them.
    """

    def __init__(self, vlm: Vlm, image: ImageSource | Sight) -> None:
        self.sight = image if isinstance(image, Sight) else vlm.see(image)
        self.messages: list[Message] = []
        self._vlm = vlm
        self._prompt = vlm.cached_prompt(self.sight)
        self._open: AnswerStream | None = None

    # fmt: off
    @overload
    def ask(
        self, question: str, stream: Literal[False] = ..., max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Answer: ...

    @overload
    def ask(
        self, question: str, stream: Literal[True], max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
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
    ) -> Answer | AnswerStream:
        """Ask the next question. The arguments and errors are those of ``Vlm.ask``.

        A stream must be read to its end, or closed, before the next question; a closed turn leaves no trace.
        """
        defaults = self._vlm.manifest.decoder.generation
        options = Options.of(defaults, max_new_tokens, temperature, top_p, top_k, seed, stop)
        answer = self.reply(question, options)
        return answer if stream else answer.answer

    def reply(self, question: str, options: Options) -> AnswerStream:
        """``ask`` with settings that are checked already: prefill now, the rest as the stream is read."""
        if self._open is not None and not self._open.done:
            raise UserError("the last answer is still being written: read its stream to the end, or close it")
        started = time.perf_counter()
        turn = user_message(self._vlm.text.check_question(question), picture=not self.messages)
        logits = self._prompt.advance(self._vlm.text.prompt_ids([*self.messages, turn]))
        self._open = AnswerStream(self._write(turn, logits, options, self._prompt.rows, time.perf_counter() - started))
        return self._open

    def _write(
        self, turn: Message, logits: np.ndarray, options: Options, prompt_rows: int, prefill: float
    ) -> Iterator[str | Answer]:
        """Pieces of text, then the answer; the turn joins the conversation at the end."""
        vlm, sight, first = self._vlm, self.sight, not self.messages
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
        yield Answer(
            text=result.text,
            token_ids=result.ids,
            kept_indices=sight.kept_indices,
            scores=sight.scores,
            tokens=Tokens(len(sight.scores), len(sight.kept_indices), prompt_rows, len(result.ids)),
            times=Times(
                preprocess=sight.preprocess if first else 0.0,
                vision=sight.vision if first else 0.0,
                prefill=prefill + result.seconds[0],
                decode=result.seconds[1:],
            ),
            stopped=result.stopped,
        )
