"""Chat: the picture encoded once, the cache carried on, and the same answers as a fresh prefill of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from svdprune.runtime import Chat, UserError, Vlm, load

QUESTIONS = ["What is this?", "Which colour?", "And the one beside it?"]
# Keeps only the last question: what the cache holds after the first turn is no beginning of the second's prompt.
FORGETFUL = (
    "{{ bos_token }}USER: {{ image_token }}\n{% set turn = messages[-1]['content'] %}{{ turn[-1]['text'] }} ASSISTANT: "
)


class Counting:
    """A decoder that counts the rows it computes."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.name, self.rows = decoder, decoder.name, []
        self.device, self.capacity = decoder.device, decoder.capacity

    def start(self) -> Any:
        state, rows = self.decoder.start(), self.rows
        append = state.append

        def counted(embeds: np.ndarray, positions: np.ndarray, *more: Any) -> np.ndarray:
            rows.append(len(embeds))
            logits: np.ndarray = append(embeds, positions, *more)
            return logits

        state.append = counted
        return state


def fresh(vlm: Vlm, chat: Chat, question: str, **settings: Any) -> list[int]:
    """The answer's ids with the whole conversation prefilled anew."""
    again = Chat(vlm, chat.sight)
    again.messages = list(chat.messages)
    return again.ask(question, **settings).token_ids


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("cache", ["bundle", "shared_bundle"])
def test_each_turn_equals_a_fresh_prefill(cache: str, policy: str, request: pytest.FixtureRequest) -> None:
    vlm = load(request.getfixturevalue(cache), threads=1, positions=policy)
    chat = vlm.chat(tiny.picture())
    for question in QUESTIONS:
        wanted = fresh(vlm, chat, question, max_new_tokens=8)
        assert chat.ask(question, max_new_tokens=8).token_ids == wanted


def test_later_turns_compute_only_what_is_new(bundle: Path) -> None:
    vlm = load(bundle, threads=1)
    counting = Counting(vlm.decoder)
    vlm.decoder = counting
    chat = vlm.chat(tiny.picture())
    first = chat.ask(QUESTIONS[0], max_new_tokens=4)
    before = len(counting.rows)
    second = chat.ask(QUESTIONS[1], max_new_tokens=4)
    assert counting.rows[0] == first.tokens.prompt
    new_prompt = counting.rows[before]
    assert new_prompt < len(QUESTIONS[1]) + 30 < second.tokens.prompt  # one token a byte, and the template's words
    assert second.times.preprocess == second.times.vision == 0


def test_the_picture_is_encoded_once(bundle: Path) -> None:
    vlm = load(bundle, threads=1)
    calls = []
    encode = vlm.vision.encode
    vlm.vision.encode = lambda pixels: calls.append(1) or encode(pixels)  # type: ignore[method-assign,func-returns-value]
    chat = vlm.chat(tiny.picture())
    for question in QUESTIONS:
        chat.ask(question, max_new_tokens=2)
    assert len(calls) == 1


def test_a_template_that_rewrites_the_past_costs_time_not_truth(tmp_path: Path) -> None:
    vlm = load(tiny.make_bundle(tmp_path / "forgetful", template=FORGETFUL), threads=1)
    chat = vlm.chat(tiny.picture())
    for question in QUESTIONS:
        wanted = vlm.ask(chat.sight, question, max_new_tokens=6).token_ids
        assert chat.ask(question, max_new_tokens=6).token_ids == wanted


def test_the_same_question_twice(bundle: Path) -> None:
    vlm = load(bundle, threads=1)
    prompt = vlm.cached_prompt(vlm.see(tiny.picture()))
    ids = vlm.prompt_ids("What?")
    first = prompt.advance(ids)
    rows = prompt.rows
    np.testing.assert_allclose(prompt.advance(ids), first, atol=1e-5)  # only its last row runs again
    assert prompt.rows == rows


def test_an_open_stream_bars_the_next_question(bundle: Path) -> None:
    chat = load(bundle, threads=1).chat(tiny.picture())
    stream = chat.ask("What?", stream=True, max_new_tokens=30)
    next(stream)
    with pytest.raises(UserError, match="still being written"):
        chat.ask("And?")
    stream.close()
    assert chat.messages == []  # a closed turn leaves no trace
    with pytest.raises(RuntimeError, match="closed before"):
        _ = stream.answer
    first = chat.ask("What?", max_new_tokens=4)
    assert (
        first.token_ids == load(chat._vlm.bundle.path, threads=1).ask(chat.sight, "What?", max_new_tokens=4).token_ids
    )


def test_a_chat_may_outgrow_the_context(bundle: Path) -> None:
    chat = load(bundle, threads=1).chat(tiny.picture())
    chat.ask("a" * 200, max_new_tokens=2)
    with pytest.raises(UserError, match="start a new chat"):
        chat.ask("b" * 200, max_new_tokens=2)
    assert len(chat.messages) == 2
    assert chat.ask("c", max_new_tokens=2).tokens.generated  # and still answers what fits
