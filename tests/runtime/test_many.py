"""Many questions: the answers of asking one by one, whatever is encoded together or ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny

from svdprune.runtime import UserError, Vlm
from svdprune.runtime.vision import VisionOutput

Opener = Callable[..., Vlm]
QUESTIONS = ("What is this?", "Where?", "What is this?", "Where is this?", "What?")


def requests() -> list[tuple[Any, str]]:
    return [(tiny.picture(seed), question) for seed, question in enumerate(QUESTIONS)]


class Batches:
    """Notes how many pictures each run of the vision graph has, and in which thread."""

    def __init__(self, vlm: Vlm) -> None:
        self._encode, self.sizes, self.threads = vlm.vision.encode, [], set()  # type: ignore[var-annotated]
        vlm.vision.encode = self  # type: ignore[method-assign, assignment]

    def __call__(self, pixels: np.ndarray, *rest: Any, **named: Any) -> VisionOutput:
        self.sizes.append(len(pixels))
        self.threads.add(threading.current_thread().name)
        return self._encode(pixels, *rest, **named)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_the_answers_are_those_of_asking_one_by_one(open_tiny: Opener, batch: int, overlap: bool) -> None:
    vlm = open_tiny()
    alone = [vlm.ask(image, question, max_new_tokens=6) for image, question in requests()]
    seen = Batches(vlm)
    together = list(vlm.ask_many(requests(), batch, overlap, max_new_tokens=6))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.kept_indices, other.kept_indices)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-7)
        assert one.times.vision > 0 and one.times.preprocess > 0
    count = len(QUESTIONS)
    assert seen.sizes == [min(batch, count - start) for start in range(0, count, batch)]
    own = threading.current_thread().name
    assert seen.threads == (seen.threads - {own} if overlap else {own}) and len(seen.threads) == 1
    assert not any(thread.name.startswith("svdprune-vision") for thread in threading.enumerate())


def test_settings_are_those_of_ask(open_tiny: Opener) -> None:
    vlm = open_tiny()
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 20, "seed": 7}
    alone = [vlm.ask(image, question, **settings).token_ids for image, question in requests()]
    assert [a.token_ids for a in vlm.ask_many(requests(), 2, **settings)] == alone


def test_pictures_seen_before_and_several_to_a_question(open_tiny: Opener) -> None:
    vlm = open_tiny()
    mixed: list[tuple[Any, str]] = [
        (vlm.see(tiny.picture(1)), "Where?"),
        ([tiny.picture(2), tiny.picture(3)], "What is this?"),
        (tiny.picture(4), "Where?"),
    ]
    alone = [vlm.ask(images, question, max_new_tokens=4).token_ids for images, question in mixed]
    assert [a.token_ids for a in vlm.ask_many(mixed, 3, max_new_tokens=4)] == alone


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("spoilt", [(b"no picture", "Where?"), (tiny.picture(1), " ")])
def test_a_request_that_cannot_be_fails_in_its_turn(
    open_tiny: Opener, spoilt: tuple[Any, str], batch: int, overlap: bool
) -> None:
    vlm = open_tiny()
    given = requests()
    given[3] = spoilt
    answers = vlm.ask_many(given, batch, overlap, max_new_tokens=2)
    got = [next(answers) for _ in range(3)]
    assert [a.token_ids for a in got] == [vlm.ask(i, q, max_new_tokens=2).token_ids for i, q in requests()[:3]]
    with pytest.raises(UserError):
        next(answers)
    assert list(answers) == []


def test_requests_are_read_as_needed_and_closing_ends_the_thread(open_tiny: Opener) -> None:
    vlm = open_tiny()
    read: list[str] = []

    def endless() -> Iterator[tuple[Any, str]]:
        while True:
            read.append(threading.current_thread().name)
            yield tiny.picture(1), "Where?"

    answers = vlm.ask_many(endless(), 2, True, max_new_tokens=1)
    assert not read
    next(answers)
    assert read == [threading.current_thread().name] * 4  # two to answer, two to encode meanwhile
    answers.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("svdprune-vision") for thread in threading.enumerate())
    assert vlm.ask(tiny.picture(1), "Where?", max_new_tokens=1).token_ids


def test_what_cannot_be_is_refused_at_once(open_tiny: Opener) -> None:
    vlm = open_tiny()
    with pytest.raises(UserError, match="batch is 0, it must be 1 or more requests"):
        vlm.ask_many(requests(), 0)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        vlm.ask_many(requests(), max_new_tokens=0)
    vlm.vision.device = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="leave out overlap"):
        vlm.ask_many(requests(), overlap=True)
    assert list(vlm.ask_many([])) == []
