"""Which rows of a cache of fixed length each new row sees, for TensorRT engines: masks made once a run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig


def cache_masks(
    ops: DecoderOperators,
    config: DecoderConfig,
    embeds: ir.Value,
    write_index: ir.Value,
    groups: ir.Value | None,
    cache: int,
) -> dict[int | None, ir.Value]:
    """For each window of the layers: bool (1, 1, N, cache), true for c <= write_index + n within the window.

    groups: int64 (1, N), rows of one group >= 0 see each other, too.

    An explicit mask and not `is_causal` with `nonpad_kv_seqlen`: opset 24 leaves open where that aligns the
    triangle (25 settles it), and TensorRT 10's attention takes no lengths.
    """
    zero, one = ops.constant("zero", np.array(0, np.int64)), ops.constant("one", np.array(1, np.int64))
    count = ops.op("Squeeze", [ops.op("Shape", [embeds], "mask/shape", start=1, end=2)], "mask/count")
    new = ops.op("Range", [zero, count, one], "mask/new")  # (N,)
    limit = ops.op("Add", [new, write_index], "mask/limit")
    # All four dimensions before the comparison: with an Unsqueeze behind it, TensorRT-RTX 1.7 fails on several
    # layers for head sizes of 24, 80, 96 and 128 ("more than one op named mask/...").
    column = ops.op("Reshape", [limit, ops.constant("column", np.array([1, 1, -1, 1], np.int64))], "mask/column")
    rows = ops.constant("cache_rows", np.arange(cache, dtype=np.int64).reshape(1, 1, 1, cache))
    mates = None if groups is None else _mates(ops, groups, write_index, count, rows)
    masks: dict[int | None, ir.Value] = {}
    for window in sorted(set(config.windows), key=str):
        name = "mask" if window is None else f"mask_{window}"
        parts = [ops.op("LessOrEqual", [rows, column], f"{name}/earlier" if window or mates else name)]
        if window is not None:
            reach = ops.constant(f"window_{window}", np.array(window, np.int64))
            parts.append(ops.op("Greater", [rows, ops.op("Sub", [column, reach], f"{name}/start")], f"{name}/near"))
        masks[window] = _combined(ops, parts, mates, config.mask == "prefix", name)
    return masks


def _combined(
    ops: DecoderOperators, parts: list[ir.Value], mates: ir.Value | None, beyond: bool, name: str
) -> ir.Value:
    """parts: the rows before, and those within the window where there is one. beyond: a group reaches beyond it."""
    earlier, near = parts[0], parts[1] if len(parts) > 1 else None
    if mates is None:
        return earlier if near is None else ops.op("And", [earlier, near], name)
    if near is None:
        return ops.op("Or", [earlier, mates], name)
    # transformers' masks: a prompt that sees all of itself does so beyond the window, a picture within it
    if beyond:
        return ops.op("Or", [ops.op("And", [earlier, near], f"{name}/causal"), mates], name)
    return ops.op("And", [ops.op("Or", [earlier, mates], f"{name}/both"), near], name)


def _mates(ops: DecoderOperators, groups: ir.Value, write_index: ir.Value, count: ir.Value, rows: ir.Value) -> ir.Value:
    """Which rows of the cache are new ones of a new row's group: bool (1, 1, N, cache)."""
    zero = ops.constant("zero", np.array(0, np.int64))
    flat = ops.constant("flat", np.array([-1], np.int64))
    place = ops.op("Sub", [rows, write_index], "groups/place")  # (1, 1, 1, cache), among the new rows
    last = ops.op("Sub", [count, ops.constant("one", np.array(1, np.int64))], "groups/last")
    inside = ops.op("Min", [ops.op("Max", [place, zero], "groups/least"), last], "groups/inside")
    theirs = ops.op("Gather", [ops.op("Reshape", [groups, flat], "groups/flat"), inside], "groups/theirs", axis=0)
    shape = ops.constant("column", np.array([1, 1, -1, 1], np.int64))
    mine = ops.op("Reshape", [groups, shape], "groups/mine")  # (1, 1, N, 1)
    found = [
        ops.op("Equal", [mine, theirs], "groups/same"),
        ops.op("GreaterOrEqual", [mine, zero], "groups/some"),
        ops.op("Equal", [inside, place], "groups/new"),
    ]
    return ops.op("And", [ops.op("And", found[:2], "groups/both"), found[2]], "groups/mates")
