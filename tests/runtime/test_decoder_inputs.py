"""What a decoder's rows must fit, and how the inputs that only some models have are made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from svdprune.runtime.decoder import check_rows, graph_positions, more_inputs
from svdprune.runtime.decoder.tensorrt import _whole_groups
from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import Layout, Span
from svdprune.runtime.prompt import Pictured, run_of

PLAIN = tiny.manifest().decoder
STACKED = dataclasses.replace(PLAIN, position_axes=3, deepstack=2)
MASKED = dataclasses.replace(PLAIN, mask="picture")
ROWS = np.zeros((4, tiny.HIDDEN), np.float32)


def test_rows_must_fit_the_decoder() -> None:
    line, axes, levels = np.arange(4), np.zeros((3, 4), np.int64), np.zeros((2, 4, tiny.HIDDEN), np.float32)
    check_rows(ROWS, line, PLAIN)
    check_rows(ROWS, axes, STACKED, levels)
    check_rows(ROWS, line, MASKED, groups=line)
    for bad in (
        lambda: check_rows(ROWS, axes, PLAIN),
        lambda: check_rows(ROWS, line, STACKED),
        lambda: check_rows(ROWS, line[:3], PLAIN),
        lambda: check_rows(ROWS, line, PLAIN, levels),
        lambda: check_rows(ROWS, axes, STACKED, levels[:1]),
        lambda: check_rows(ROWS, line, PLAIN, groups=line),
        lambda: check_rows(ROWS, line, MASKED, groups=line[:2]),
    ):
        with pytest.raises(ValueError, match="fit"):
            bad()


def test_inputs_that_only_some_graphs_have() -> None:
    assert more_inputs(PLAIN, 4, None, None) == {}
    empty = more_inputs(dataclasses.replace(STACKED, mask="picture"), 4, None, None)
    assert empty["deepstack"].shape == (2, 1, 4, tiny.HIDDEN) and not empty["deepstack"].any()
    assert empty["groups"].tolist() == [[-1] * 4]
    assert more_inputs(MASKED, 4, None, np.array([-1, 0, 0, -1]))["groups"].tolist() == [[-1, 0, 0, -1]]
    assert graph_positions(np.arange(4)).shape == (1, 4)
    assert graph_positions(np.zeros((3, 4), np.int64)).shape == (3, 1, 4)


def test_an_engine_gets_a_group_in_one_run() -> None:
    groups = np.array([-1, -1, 0, 0, 0, -1, 1, 1])
    assert [_whole_groups(groups, 0, count) for count in (1, 2, 3, 4, 5, 6, 7, 8)] == [1, 2, 2, 2, 5, 6, 6, 8]
    assert _whole_groups(groups, 5, 2) == 1 and _whole_groups(None, 0, 3) == 3
    with pytest.raises(UserError, match="more than the 2 that the decoder engine takes at once"):
        _whole_groups(groups, 2, 2)


def test_levels_stand_at_their_pictures_rows() -> None:
    """Zeros at text; a picture that begins after the rows in the cache has its levels from the first new row on."""
    spans = Span(np.arange(2), 2), Span(np.arange(3), 3)
    layout = Layout((1, 3), spans, "compact", mask="picture")
    features = [np.full((len(span.kept), tiny.HIDDEN), number, np.float32) for number, span in enumerate(spans, 1)]
    pictures = [Pictured(span, own, np.stack([own, 10 * own])) for span, own in zip(spans, features, strict=True)]
    ids = [7, 3, 7, 3, 7]
    run = run_of(layout, ids, 0, pictures, lambda tokens: np.zeros((len(tokens), tiny.HIDDEN), np.float32))
    assert run.deepstack is not None and run.groups is not None
    assert run.deepstack[1, :, 0].tolist() == [0, 10, 10, 0, 20, 20, 20, 0]
    assert run.groups.tolist() == [-1, 0, 0, -1, 1, 1, 1, -1]
    later = run_of(layout, ids, 2, pictures, lambda tokens: np.zeros((len(tokens), tiny.HIDDEN), np.float32))
    assert later.deepstack is not None and later.deepstack[0, :, 0].tolist() == [0, 2, 2, 2, 0]
    text = run_of(layout, ids, 4, pictures, lambda tokens: np.zeros((len(tokens), tiny.HIDDEN), np.float32))
    assert text.deepstack is None and text.groups is not None and text.groups.tolist() == [-1]
