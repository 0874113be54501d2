"""Positions by both policies, spelled out, and the splice."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import Layout, picture_place, policy_named, splice

KEPT = np.array([1, 4, 5])


def test_compact_counts_on() -> None:
    layout = Layout(place=2, kept=KEPT, total=8, policy="compact")
    assert layout.span(0, 6).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layout.position(6) == 8


def test_original_keeps_the_places() -> None:
    layout = Layout(place=2, kept=KEPT, total=8, policy="original")
    assert layout.span(0, 6).tolist() == [0, 1, 3, 6, 7, 10, 11, 12]
    assert layout.position(6) == 13


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_any_cut_of_the_prompt_gives_the_same_rows(policy: str, place: int) -> None:
    layout = Layout(place, KEPT, 8, policy_named(policy))
    whole = layout.span(0, 8)
    assert len(whole) == layout.rows(8) == 10
    for cut in range(9):
        assert np.concatenate([layout.span(0, cut), layout.span(cut, 8)]).tolist() == whole.tolist()
        assert len(layout.span(0, cut)) == layout.rows(cut)
    for index in range(8):
        if index != place:
            assert whole[layout.rows(index)] == layout.position(index)
    assert (np.diff(whole) > 0).all()


def test_all_kept_makes_the_policies_one() -> None:
    kept = np.arange(5)
    spans = [Layout(1, kept, 5, policy_named(policy)).span(0, 4).tolist() for policy in ("compact", "original")]
    assert spans[0] == spans[1] == list(range(8))


def test_splice_puts_the_features_in_place() -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    features = -np.ones((3, 2), np.float16)
    rows = splice([7, 3, 9, 1], 1, features, lambda ids: table[list(ids)])
    assert rows.dtype == np.float32
    assert rows.tolist() == [table[7].tolist(), *features.tolist(), table[9].tolist(), table[1].tolist()]


@pytest.mark.parametrize(("ids", "words"), [([1, 2], "no place for the picture"), ([3, 1, 3], "2 places for pictures")])
def test_a_prompt_has_one_picture(ids: list[int], words: str) -> None:
    assert picture_place([1, 3, 2], 3) == 1
    with pytest.raises(UserError, match=words):
        picture_place(ids, 3)
