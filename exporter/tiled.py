"""Tiles in the vision graph: the candidates of a selection gathered from all tiles' tokens, and their features.

A candidate is a weighted sum of R tokens (`svdprune.runtime.tiling`). The graph gets, beside `pixels`, the inputs
`sources` int64 (G, S, R) and `weights` float32 (G, S, R) for G choices of S slots; an empty slot has weights 0. It is
scored as a row of zeros, which no singular vector sees, and its score is set below every other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from svdprune.exporter.families import VisionSpec

EMPTY = -1.0  # the score of an empty slot; those of tokens are 0 or more


@dataclass(frozen=True)
class Candidates:
    """Values of a graph.

    flat: all tiles' tokens (N * T, D), in the encoder's precision. rows: float32 (G, S, D). attention: float32 (G, S)
    or None. sources, weights: the inputs. present: bool (G, S).
    """

    flat: ir.Value
    rows: ir.Value
    attention: ir.Value | None
    sources: ir.Value
    weights: ir.Value
    present: ir.Value


def candidates(model: ir.Model, tokens: ir.Value, attention: ir.Value | None, spec: VisionSpec) -> Candidates:
    """Add the two inputs and gather the candidates.

    Args:
        tokens: (N, T, D) of the encoder. attention: float32 (N, T), or None.
    """
    tiles = spec.tiles()
    assert tiles is not None  # who calls this has seen that there are tiles
    tape = ir.tape.Tape(model.graph)
    groups = 1 if spec.budget != "tile" else model.graph.inputs[0].shape[0]  # type: ignore[index]
    shape = ir.Shape([groups, spec.tokens, tiles.sources])
    sources = ir.Value(name="sources", type=ir.TensorType(ir.DataType.INT64), shape=shape)
    weights = ir.Value(name="weights", type=ir.TensorType(ir.DataType.FLOAT), shape=shape.copy())
    model.graph.inputs.extend([sources, weights])

    def constant(name: str, value: object) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, np.int64)), name=f"tiles/{name}")

    flat = tape.op("Reshape", [tokens, constant("flat_shape", [-1, spec.channels])], name="tiles/flat")
    seen = None
    if attention is not None:
        line = tape.op("Reshape", [attention, constant("line_shape", [-1])], name="tiles/line")
    rows: ir.Value | None = None
    last = constant("last_axis", [2])
    for r in range(tiles.sources):
        which = constant(f"source_{r}", r)
        index = tape.op("Gather", [sources, which], {"axis": 2}, name=f"tiles/index_{r}")  # (G, S)
        weight = tape.op("Gather", [weights, which], {"axis": 2}, name=f"tiles/weight_{r}")
        wide = tape.op("Unsqueeze", [weight, last], name=f"tiles/wide_{r}")  # (G, S, 1)
        row = tape.op("Gather", [flat, index], {"axis": 0}, name=f"tiles/rows_{r}")  # (G, S, D)
        row = tape.op("Cast", [row], {"to": ir.DataType.FLOAT}, name=f"tiles/float_{r}")
        row = tape.op("Mul", [row, wide], name=f"tiles/weighted_{r}")
        rows = row if rows is None else tape.op("Add", [rows, row], name=f"tiles/sum_{r}")
        if attention is not None:
            part = tape.op("Gather", [line, index], {"axis": 0}, name=f"tiles/attention_{r}")
            part = tape.op("Mul", [part, weight], name=f"tiles/attended_{r}")
            seen = part if seen is None else tape.op("Add", [seen, part], name=f"tiles/attention_sum_{r}")
    assert rows is not None  # there is at least one source
    share = tape.op("ReduceSum", [weights, last], {"keepdims": 0}, name="tiles/share")
    zero = tape.initializer(ir.tensor(np.float32(0)), name="tiles/zero")
    present = tape.op("Greater", [share, zero], name="tiles/present")
    return Candidates(flat, rows, seen, sources, weights, present)


def mask_scores(model: ir.Model, scores: ir.Value, found: Candidates) -> ir.Value:
    """Scores float32 (G, S) with those of empty slots below all others."""
    tape = ir.tape.Tape(model.graph)
    empty = tape.initializer(ir.tensor(np.float32(EMPTY)), name="select/empty")
    return tape.op("Where", [found.present, scores, empty], name="select/present")


def kept_rows(model: ir.Model, found: Candidates, column: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Tokens (G, K * R, D) that the kept candidates are made of, and their weights (G, K, R).

    Args:
        column: kept slots int64 (G, K, 1), or None for all of them.
    """
    tape = ir.tape.Tape(model.graph)
    sources, weights = found.sources, found.weights
    if column is not None:
        # Through float, exact for any count of tokens: older engines gather no integers by GatherND.
        wide = tape.op("Cast", [sources], {"to": ir.DataType.FLOAT}, name="select/sources")
        wide = tape.op("GatherND", [wide, column], {"batch_dims": 1}, name="select/gather_sources")
        sources = tape.op("Cast", [wide], {"to": ir.DataType.INT64}, name="select/kept_sources")
        weights = tape.op("GatherND", [weights, column], {"batch_dims": 1}, name="select/gather_weights")
    shape = tape.initializer(ir.tensor(np.array([0, -1])), name="select/row_shape")
    index = tape.op("Reshape", [sources, shape], name="select/rows")
    return tape.op("Gather", [found.flat, index], {"axis": 0}, name="select/gather"), weights


def kept_levels(model: ir.Model, found: Candidates, levels: ir.Value, width: int, column: ir.Value | None) -> ir.Value:
    """Levels (G, K, C) of the kept candidates, each of one source, from those of all tokens (N, T, C).

    Args:
        width: C. column: as of `kept_rows`.
    """
    tape = ir.tape.Tape(model.graph)
    flat_shape = tape.initializer(ir.tensor(np.array([-1, width])), name="tiles/levels_shape")
    flat = tape.op("Reshape", [levels, flat_shape], name="tiles/levels")
    first = tape.initializer(ir.tensor(np.asarray(0, np.int64)), name="select/first_source")
    index = tape.op("Gather", [found.sources, first], {"axis": 2}, name="select/level_sources")  # (G, S)
    if column is not None:
        wide = tape.op("Cast", [index], {"to": ir.DataType.FLOAT}, name="select/level_places")
        wide = tape.op("GatherND", [wide, column], {"batch_dims": 1}, name="select/gather_level_sources")
        index = tape.op("Cast", [wide], {"to": ir.DataType.INT64}, name="select/kept_level_sources")
    return tape.op("Gather", [flat, index], {"axis": 0}, name="select/gather_levels")


def joined(model: ir.Model, features: ir.Value, weights: ir.Value, count: int, hidden: int) -> ir.Value:
    """Features float32 (G, K, H) of candidates from those of their R sources, (G, K * R, H)."""
    tape = ir.tape.Tape(model.graph)
    shape = tape.initializer(ir.tensor(np.array([0, -1, count, hidden])), name="projector/source_shape")
    axis = tape.initializer(ir.tensor(np.array([3])), name="projector/last_axis")
    over = tape.initializer(ir.tensor(np.array([2])), name="projector/sources_axis")
    parts = tape.op("Reshape", [features, shape], name="projector/sources")
    wide = tape.op("Unsqueeze", [weights, axis], name="projector/weights")
    return tape.op(
        "ReduceSum",
        [tape.op("Mul", [parts, wide], name="projector/weighted"), over],
        {"keepdims": 0},
        name="projector/joined",
    )
