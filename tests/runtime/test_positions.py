"""Positions by both policies, spelled out, and the splice."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Mask, Positions
from svdprune.runtime.positions import Layout, Span, one_picture, picture_place, picture_places, policy_named, splice

KEPT = np.array([1, 4, 5])


def test_compact_counts_on() -> None:
    layout = one_picture(place=2, kept=KEPT, total=8, policy="compact")
    assert layout.span(0, 6).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layout.position(6) == 8


def test_original_keeps_the_places() -> None:
    layout = one_picture(place=2, kept=KEPT, total=8, policy="original")
    assert layout.span(0, 6).tolist() == [0, 1, 3, 6, 7, 10, 11, 12]
    assert layout.position(6) == 13


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_any_cut_of_the_prompt_gives_the_same_rows(policy: str, place: int) -> None:
    layout = one_picture(place, KEPT, 8, policy_named(policy))
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
    spans = [one_picture(1, kept, 5, policy_named(policy)).span(0, 4).tolist() for policy in ("compact", "original")]
    assert spans[0] == spans[1] == list(range(8))


def test_splice_puts_the_features_in_place() -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    features = -np.ones((3, 2), np.float16)
    rows = splice([7, 3, 9, 1], 1, features, lambda ids: table[list(ids)])
    assert rows.dtype == np.float32
    assert rows.tolist() == [table[7].tolist(), *features.tolist(), table[9].tolist(), table[1].tolist()]


@pytest.mark.parametrize(
    ("ids", "words"), [([1, 2], "no place for the picture"), ([3, 1, 3], "2 places for the picture, one")]
)
def test_a_prompt_has_one_picture(ids: list[int], words: str) -> None:
    assert picture_place([1, 3, 2], 3) == 1
    with pytest.raises(UserError, match=words):
        picture_place(ids, 3)


TWO = (Span(KEPT, 8), Span(np.array([0, 3]), 4))
GRID = Span(np.array([1, 4, 5]), 6, np.array([[0, 0, 1], [0, 1, 1], [0, 1, 2]]), 3)  # two rows of three


def two(policy: Positions, mask: Mask = "causal") -> Layout:
    return Layout((1, 3), TWO, policy, mask=mask)


def test_several_pictures_count_on_from_each_other() -> None:
    compact, original = two("compact"), two("original")
    assert compact.span(0, 6).tolist() == list(range(9)) and compact.position(6) == 9
    assert original.span(0, 6).tolist() == [0, 2, 5, 6, 9, 10, 13, 14, 15]
    assert original.position(6) == 16
    for layout in (compact, original):
        for cut in range(7):
            parts = [layout.span(0, cut), layout.span(cut, 6)]
            assert np.concatenate(parts).tolist() == layout.span(0, 6).tolist()
            assert len(parts[0]) == layout.rows(cut)


def test_a_picture_may_keep_nothing() -> None:
    layout = Layout((1, 2), (Span(np.zeros(0, np.int64), 4), TWO[1]), "original")
    assert layout.span(0, 4).tolist() == [0, 5, 8, 9]
    assert (layout.rows(2), layout.rows(4)) == (1, 4)


def test_three_axes_keep_time_row_and_column() -> None:
    layout = Layout((2,), (GRID,), "original", axes=3)
    assert layout.span(0, 5).tolist() == [[0, 1, 2, 2, 2, 5, 6], [0, 1, 2, 3, 3, 5, 6], [0, 1, 3, 3, 4, 5, 6]]
    assert layout.position(5) == 7
    compact = Layout((2,), (GRID,), "compact", axes=3)
    assert compact.span(0, 5).tolist() == [list(range(7))] * 3
    assert layout.span(5, 6).tolist() == [[7]] * 3  # the first token of the answer
    with pytest.raises(ValueError, match="three axes"):
        Layout((2,), (TWO[0],), "original", axes=3)


def test_groups_are_pictures_or_the_whole_prompt() -> None:
    assert two("compact").groups(0, 6) is None
    pictures, prefix = two("compact", "picture").groups(0, 6), two("compact", "prefix").groups(0, 6)
    assert pictures is not None and pictures.tolist() == [-1, 0, 0, 0, -1, 1, 1, -1, -1]
    assert prefix is not None and prefix.tolist() == [0] * 9


def test_places_are_as_many_as_pictures() -> None:
    assert picture_places([3, 1, 3], 3, 2) == (0, 2)
    with pytest.raises(UserError, match="1 place for the pictures, 2 pictures must be in it"):
        picture_places([3, 1], 3, 2)
