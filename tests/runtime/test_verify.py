"""`verify` passes what agrees, and names the stage that does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from golden import golden_bundle, reference

from svdprune.runtime.errors import BundleError
from svdprune.runtime.verify import verify
from svdprune.runtime.verify_metrics import cosines, kept_overlap

STAGES = ["kept tokens", "vision features", "first-step logits", "answer"]


@pytest.fixture(scope="session")
def right(bundle):
    """The golden case and arrays of the tiny bundle."""
    return reference(bundle)


@pytest.fixture
def spoil(bundle, tmp_path):
    """Make a golden bundle with parts replaced, and verify it."""
    made = itertools.count()
    return lambda **parts: verify(golden_bundle(bundle, tmp_path / f"spoilt{next(made)}", **parts), threads=1)


def test_a_right_bundle_passes_every_stage(spoil, right):
    report = spoil()
    assert [stage.name for stage in report.stages] == STAGES
    assert report.passed and report.failed == []
    kept, features, logits, answer = report.stages
    assert kept.measured == {"overlap": 1.0, "identical": "4 of 4"}
    assert features.measured["cosine"] > 0.99999 and features.measured["max error"] < 1e-4
    assert logits.measured["cosine"] > 0.99999 and logits.measured["rank of the reference's best"] == 1
    assert answer.measured["answer"].startswith(right[0]["answer"])


def test_other_features_are_told(spoil, right):
    features = right[1]["features"].copy()
    features[2] = -features[2]
    report = spoil(features=features)
    assert "vision features" in report.failed and "kept tokens" not in report.failed
    assert report.stages[1].measured["cosine"] < 0


def test_another_choice_of_tokens_is_told(spoil, right):
    case, arrays = right
    worst = [int(token) for token in np.argsort(arrays["scores"]) if token not in case["kept_indices"]]
    report = spoil(kept_indices=sorted([*case["kept_indices"][:2], *worst[:2]]), scores=-arrays["scores"])
    assert "kept tokens" in report.failed
    assert report.stages[0].measured["identical"] == "2 of 4"


def test_nothing_in_common_is_out_of_tolerance(spoil, right):
    case, arrays = right
    others = [token for token in range(len(arrays["scores"])) if token not in case["kept_indices"]]
    report = spoil(kept_indices=others[:4], scores=-arrays["scores"])
    assert report.failed[:2] == ["kept tokens", "vision features"]


def test_other_logits_are_told_apart_from_other_features(spoil, right):
    report = spoil(logits=np.roll(right[1]["logits"], 1))
    assert report.failed == ["first-step logits"]


def test_another_answer_is_told(spoil, right):
    ids = list(right[0]["answer_ids"])
    ids[-1] += 1
    assert spoil(answer_ids=ids).failed == ["answer"]


def test_an_answer_that_does_not_end_where_it_should_is_told(spoil):
    assert spoil(stopped="eos").failed == ["answer"]  # the golden answer was cut, so the model goes on
    assert spoil(stopped="length").passed


def test_fp32_is_held_tightly(spoil, right):
    case, arrays = right
    noise = np.random.default_rng(0).normal(size=arrays["features"].shape) * 0.02 * arrays["features"].std()
    ids = list(case["answer_ids"])
    ids[-1] += 1
    parts = {"features": (arrays["features"] + noise).astype(np.float32), "answer_ids": ids}
    report = spoil(**parts)
    assert "vision features" in report.failed and "answer" in report.failed
    assert report.stages[1].allowed["cosine at least"] == 0.9999


def test_fp16_and_int4_allow_more(spoil, right):
    case, arrays = right
    noise = np.random.default_rng(0).normal(size=arrays["features"].shape) * 0.02 * arrays["features"].std()
    ids = list(case["answer_ids"])
    ids[-1] += 1
    parts = {"features": (arrays["features"] + noise).astype(np.float32), "answer_ids": ids}
    report = spoil(vision="fp16", decoder="int4", **parts)
    assert report.passed
    assert report.stages[1].allowed["cosine at least"] < 0.9999 and "any" in report.stages[3].allowed["answer"]


def test_a_half_precision_reference_is_not_held_to_float32(spoil):
    report = spoil(dtype="bfloat16")
    assert report.reference == "bfloat16" and report.stages[1].allowed["cosine at least"] < 0.9999


def test_the_golden_positions_are_used(spoil):
    report = spoil(positions="original")  # the case was made with compact positions: the logits must tell
    assert "first-step logits" in report.failed and "vision features" not in report.failed


@pytest.mark.parametrize(
    "parts",
    [
        {"question": None},
        {"logits": None},
        {"prompt_ids": "words"},
        {"features": np.zeros((2, 2), np.float32)},
        {"logits": np.zeros(3, np.float32)},
        {"kept_indices": [1]},
    ],
)
def test_a_golden_case_that_does_not_fit_is_a_broken_bundle(spoil, parts):
    with pytest.raises(BundleError, match="export the bundle again"):
        spoil(**parts)


def test_a_precision_without_tolerances_is_refused(spoil):
    with pytest.raises(BundleError, match="no tolerance is known for the precision fp4"):
        spoil(vision="fp4")


def test_near_ties_may_swap():
    scores = np.array([5.0, 3.0, 2.9999, 1.0])
    reference = np.array([0, 1])
    assert kept_overlap(np.array([0, 1]), reference, scores, 0.0) == 1.0
    assert kept_overlap(np.array([0, 2]), reference, scores, 1e-3) == 1.0
    assert kept_overlap(np.array([0, 2]), reference, scores, 1e-6) == 0.5
    assert kept_overlap(np.array([2, 3]), reference, scores, 1e-3) == 0.5


def test_near_ties_may_swap_below_zero():
    scores = np.array([-1.0, -2.0, -2.0001, -9.0])
    assert kept_overlap(np.array([0, 2]), np.array([0, 1]), scores, 1e-3) == 1.0
    assert kept_overlap(np.array([0, 3]), np.array([0, 1]), scores, 1e-3) == 0.5


def test_cosines_of_zero_rows():
    rows = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert cosines(rows, np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])).tolist() == [1.0, 0.0, 1.0]
