"""Settings of the selectors, and the sentences that refuse bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from svdprune.exporter.selection import SelectorConfig, build_selector, parse_keep, selector_model, selector_names
from svdprune.exporter.selection.baselines import grid_indices
from svdprune.runtime.errors import UserError


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"name": "leverrage"}, r"unknown selector 'leverrage' \(did you mean leverage\?\): choose from cls, dpp,"),
        ({"rank": 0}, "rank must be a whole number of 1 or more, not 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"iterations": 0}, "iterations must be a whole number of 1 or more"),
        ({"block": -3}, "block must be a whole number"),
        ({"rank": 16, "block": 8}, "block 8 cannot hold rank 16: give a block of at least 32, or none"),
        ({"variance": 0.0}, r"variance is a share above 0 and up to 1 \(0.9 is 90 %\), not 0.0"),
        ({"variance": 90}, "variance is a share above 0 and up to 1"),
        ({"variance": float("nan")}, "variance is a share"),
        ({"variance": 0.9, "block": 1}, "a variance threshold needs a block of 2"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SelectorConfig(**settings)


@pytest.mark.parametrize(
    "given, tokens, expected",
    [
        ("32", 576, 32), (32, 576, 32), (" 32 ", 576, 32), ("576", 576, 576), ("10%", 576, 58), ("100%", 576, 576),
        ("0.01%", 576, 1), ("12.5%", 64, 8), ("1", 1, 1),
    ],
)  # fmt: skip
def test_keep_is_a_count_or_a_share(given: str | int, tokens: int, expected: int) -> None:
    assert parse_keep(given, tokens) == expected


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("0", "cannot keep 0 tokens: keep 1 or more"),
        (0, "keep 1 or more"),
        ("-5", "cannot keep -5 tokens: keep 1 or more"),
        ("577", "cannot keep 577 tokens: the picture has 576"),
        ("many", "cannot keep 'many' tokens: give a count such as 32 or a share such as 10%"),
        ("", "cannot keep ''"),
        ("3.5", "cannot keep '3.5' tokens: give a count"),
        ("%", "cannot keep '%'"),
        ("150%", "cannot keep 150% of the tokens: a share is above 0% and up to 100%"),
        ("0%", "cannot keep 0% of the tokens"),
        ("-1%", "cannot keep -1% of the tokens"),
        ("nan%", "cannot keep nan% of the tokens"),
        ("inf%", "cannot keep inf% of the tokens"),
    ],
)
def test_impossible_keeps_are_refused(given: str | int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_keep(given, 576)


def test_what_does_not_fit_the_features_is_refused() -> None:
    with pytest.raises(UserError, match="rank 16 is more than the 9 directions that features of 9 tokens x 32"):
        selector_model(SelectorConfig(rank=16), 9, 32)
    with pytest.raises(UserError, match="cannot keep 10 of 9 tokens: keep from 1 to 9"):
        build_selector(SelectorConfig(name="norm"), 9, 32, keep=10)
    with pytest.raises(UserError, match="`none` keeps all 9 tokens"):
        SelectorConfig(name="none").check(tokens=9, channels=32, keep=4)
    with pytest.raises(UserError, match="`grid` needs a grid of 9 patches"):
        selector_model(SelectorConfig(name="grid"), 9, 32, grid=(2, 4), keep=3)
    with pytest.raises(UserError, match="`maxmin` needs a number of kept tokens"):
        selector_model(SelectorConfig(name="maxmin"), 9, 32)
    with pytest.raises(UserError, match=r"calibrated start has shape \(16, 8\) where \(32, 9\) is needed"):
        selector_model(SelectorConfig(rank=4), 9, 32, start=np.zeros((16, 8)))


def test_defaults_follow_the_rank() -> None:
    assert (SelectorConfig(rank=16).columns(576, 384), SelectorConfig(rank=16).rounds) == (64, 2)
    assert (SelectorConfig(rank=32).columns(576, 384), SelectorConfig(rank=32).rounds) == (128, 2)
    assert SelectorConfig(rank=40).columns(576, 1024) == 160
    assert SelectorConfig(rank=32, block=64).rounds == 3
    assert SelectorConfig(rank=4).columns(9, 32) == 9
    assert SelectorConfig(variance=0.9).rank_limit(64) == 32


@pytest.mark.parametrize(
    "config",
    [
        SelectorConfig(),
        SelectorConfig(rank=32, centre=True, seed=3),
        SelectorConfig(variance=0.9),
        SelectorConfig(rank=8, block=24, iterations=5),
        SelectorConfig(name="random", seed=7),
        SelectorConfig(name="norm"),
        SelectorConfig(name="leverage-dpp", rank=8, centre=True),
        SelectorConfig(name="leverage-grid", variance=0.9),
    ],
)
def test_the_manifest_fields_rebuild_the_same_selector(config: SelectorConfig) -> None:
    fields = config.manifest_fields()
    again = SelectorConfig(**{k: v for k, v in fields.items() if v is not None and k != "start"})  # type: ignore[arg-type]
    assert again.manifest_fields() == fields
    assert (again.rounds, again.columns(576, 384)) == (config.rounds, config.columns(576, 384))


@pytest.mark.parametrize("grid", [(24, 24), (5, 9), (1, 7), (16, 3)])
def test_the_uniform_grid_gives_any_number_of_different_places(grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1]
    for keep in range(1, total + 1):
        chosen = grid_indices(grid, keep)
        assert len(chosen) == keep and (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < total


def test_the_uniform_grid_is_even() -> None:
    rows, columns = np.divmod(grid_indices((24, 24), 36), 24)
    np.testing.assert_array_equal(np.unique(rows), np.arange(2, 24, 4))
    np.testing.assert_array_equal(np.unique(columns), np.arange(2, 24, 4))


def test_names() -> None:
    assert selector_names() == [
        *("cls", "dpp", "grid", "leverage", "leverage-dpp", "leverage-grid", "maxmin", "none", "norm", "random"),
    ]
