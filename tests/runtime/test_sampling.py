"""Sampling: the distribution that is drawn from, seeds, and transformers' warpers as the reference."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.runtime.sampling import Sampler, Sampling, probabilities
from svdprune.runtime.stops import StopFilter

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling()).pick(np.array([1, 3, 3, 2], np.float32)) == 1


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_the_distribution(sampling: Sampling, wanted: list[float]) -> None:
    np.testing.assert_allclose(probabilities(LOGITS, sampling), wanted, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=4, seed=5)
    sampler = Sampler(sampling)
    draws = np.bincount([sampler.pick(LOGITS) for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(draws, probabilities(LOGITS, sampling), atol=0.03)


def test_large_logits_do_not_overflow() -> None:
    chances = probabilities(np.array([1e4, 0, -1e4], np.float32), Sampling(temperature=0.01))
    assert chances.tolist() == [1, 0, 0]


def test_warpers_of_transformers() -> None:
    reason = "the reference warpers are not installed here"
    torch = pytest.importorskip("torch", reason=reason)
    process = pytest.importorskip("transformers.generation.logits_process", reason=reason)
    random = np.random.default_rng(0)
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.3, 50, 0.5), (1.0, 1, 1.0), (0.9, 0, 0.95), (2.0, 20, 0.99)):
        logits = random.normal(size=200).astype(np.float32) * 3
        scores = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
        if top_k:
            scores = process.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = process.TopPLogitsWarper(top_p)(None, scores)
        wanted = torch.softmax(scores[0].double(), 0).numpy()
        ours = probabilities(logits, Sampling(temperature, top_k, top_p))
        np.testing.assert_allclose(ours, wanted, atol=1e-6)
        assert ((ours > 0) == (wanted > 0)).all()


@pytest.mark.parametrize(
    "pieces", [["Hello STOP there"], ["Hel", "lo ", "ST", "OP", " there"], list("Hello STOP there")]
)
def test_a_stop_string_is_found_across_pieces(pieces: list[str]) -> None:
    stops = StopFilter(["END", "STOP"])
    text = ""
    for piece in pieces:
        text += stops.push(piece)
        if stops.hit:
            break
    assert text == "Hello "
    assert stops.hit


def test_the_start_of_a_stop_string_is_held_then_given() -> None:
    stops = StopFilter(["STOP"])
    assert [stops.push(piece) for piece in ("a S", "T", "x S")] == ["a ", "", "STx "]
    assert stops.finish() == "S"
    assert not stops.hit


def test_the_earliest_stop_string_wins() -> None:
    stops = StopFilter(["there", "lo"])
    assert stops.push("Hello there") == "Hel"


def test_without_stop_strings_nothing_is_held() -> None:
    stops = StopFilter([])
    assert stops.push("anything") == "anything"
    assert stops.finish() == ""
