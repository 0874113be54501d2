"""What ONNX Runtime's causal attention kernel lacks: windows of the right length, and rows that see later ones.

`groups` int64 (B, N) gives the new rows: rows of one group >= 0 see each other both ways, -1 sees earlier rows only. A
picture's rows are a group, or a whole prompt; the runtime gives a group whole, in one run. Where a run has no group
the causal kernel's result is taken, and nothing else is computed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig

UNSEEN = np.array(-np.inf, np.float32)  # each row sees itself at the least


class Windows:
    """For each window of the layers which rows of the cache are within it of each new row: made once a run.

    They go to the kernel as a bias. It has an option `local_window_size`, but ONNX Runtime 1.22 and 1.23 let one row
    more into the window than 1.32 does.
    """

    def __init__(self, ops: DecoderOperators, config: DecoderConfig, positions: ir.Value, total: ir.Value) -> None:
        """positions: ends in the new rows, N. total: int32 scalar, rows of the cache when the new ones are in it."""
        self._ops = ops
        one = ops.constant("one", np.array(1, np.int64))
        self.total = ops.op("Cast", [total], "rows/total", to=int(ir.DataType.INT64))
        count = ops.op("Squeeze", [ops.op("Shape", [positions], "rows/shape", start=-1)], "rows/count")
        self.past = ops.op("Sub", [self.total, count], "rows/past")
        new = ops.op("Range", [self.past, self.total, one], "rows/new")
        self.rows = ops.op(
            "Reshape", [new, ops.constant("column", np.array([-1, 1], np.int64))], "rows/column"
        )  # (N, 1)
        zero = ops.constant("zero", np.array(0, np.int64))
        self.every = ops.op("Range", [zero, self.total, one], "rows/every")  # (total,)
        windows = sorted({window for window in config.windows if window is not None})
        self.near = {window: self._near(window, f"window_{window}/near") for window in windows}  # bool (N, total)
        self.biases = {window: self._bias(near, f"window_{window}/bias") for window, near in self.near.items()}

    def _near(self, window: int, name: str) -> ir.Value:
        reach = self._ops.constant(f"window_{window}", np.array(window, np.int64))
        return self._ops.op("Greater", [self.every, self._ops.op("Sub", [self.rows, reach], f"{name}/start")], name)

    def _bias(self, near: ir.Value, name: str) -> ir.Value:
        """float32 (1, 1, N, total): 0 or minus infinity."""
        ops = self._ops
        nothing, unseen = ops.constant("nothing", np.array(0, np.float32)), ops.constant("unseen", UNSEEN)
        axes = ops.constant("first_axes", np.array([0, 1], np.int64))
        return ops.op("Unsqueeze", [ops.op("Where", [near, nothing, unseen], f"{name}/rows"), axes], name)


class GroupedRows:
    """The masks of a run with groups, made once for all layers, and one layer's attention under them."""

    def __init__(self, ops: DecoderOperators, config: DecoderConfig, groups: ir.Value, windows: Windows) -> None:
        self._ops, self._config, self._windows = ops, config, windows
        self._zero = ops.constant("zero", np.array(0, np.int64))
        largest = ops.op("ReduceMax", [groups], "groups/largest", keepdims=0)
        self._any = ops.op("GreaterOrEqual", [largest, self._zero], "groups/any")
        self._masks = self._make_masks(groups)

    def attend(
        self, query: ir.Value, keys: ir.Value, values: ir.Value, causal: ir.Value, window: int | None, name: str
    ) -> ir.Value:
        """(B, N, heads * head_dim): `causal` itself where the run has no group.

        Args:
            query: (B, N, heads * head_dim).
            keys, values: (B, kv_heads, rows, head_dim), the first `total` of which are written.
        """
        ops = self._ops
        grouped = ops.branch(lambda: self._masked(query, keys, values, window, f"{name}/grouped"), f"{name}/grouped")
        plain = ops.branch(lambda: ops.op("Identity", [causal], f"{name}/plain"), f"{name}/plain")
        return ops.op("If", [self._any], name, then_branch=grouped, else_branch=plain)

    def _masked(self, query: ir.Value, keys: ir.Value, values: ir.Value, window: int | None, name: str) -> ir.Value:
        ops, config = self._ops, self._config
        shares = config.heads // config.kv_heads
        split = ops.constant("split_shares", np.array([0, 0, config.kv_heads, shares, config.head_dim], np.int64))
        heads = ops.op("Reshape", [query, split], f"{name}/split")  # (B, N, kv_heads, shares, head_dim)
        heads = ops.op(
            "Transpose", [heads], f"{name}/heads", perm=[0, 2, 3, 1, 4]
        )  # (B, kv_heads, shares, N, head_dim)
        turned = ops.op("Transpose", [self._written(keys, f"{name}/keys")], f"{name}/turned", perm=[0, 1, 2, 4, 3])
        scores = ops.op(
            "MatMul",
            [ops.op("Mul", [heads, ops.attention_scale(np.float32)], f"{name}/scaled"), turned],
            f"{name}/scores",
        )
        if config.attention_softcap is not None:
            scores = ops.softcap(scores, config.attention_softcap, f"{name}/capped")
        unseen = ops.constant("unseen", UNSEEN)
        scores = ops.op("Where", [self._masks[window], scores, unseen], f"{name}/seen")
        shared = ops.op("Softmax", [scores], f"{name}/softmax", axis=-1)  # (B, kv_heads, shares, N, total)
        rows = ops.op("MatMul", [shared, self._written(values, f"{name}/values")], f"{name}/sums")
        rows = ops.op("Transpose", [rows], f"{name}/rows", perm=[0, 3, 1, 2, 4])
        joined = ops.constant("join_shares", np.array([0, 0, config.heads * config.head_dim], np.int64))
        return ops.op("Reshape", [rows, joined], f"{name}/joined")

    def _written(self, cache: ir.Value, name: str) -> ir.Value:
        """(B, kv_heads, rows, head_dim) -> (B, kv_heads, 1, total, head_dim)."""
        ops, axis = self._ops, self._ops.constant("rows_axis", np.array([2], np.int64))
        first, end = (
            ops.constant("first_axis", np.array([0], np.int64)),
            self._shaped(self._windows.total, [-1], f"{name}/end"),
        )
        return ops.op("Unsqueeze", [ops.op("Slice", [cache, first, end, axis], f"{name}/written"), axis], name)

    def _make_masks(self, groups: ir.Value) -> dict[int | None, ir.Value]:
        """For each window of the layers, which rows of the cache each new row sees: bool (B, 1, 1, N, total)."""
        ops = self._ops
        earlier = ops.op("LessOrEqual", [self._windows.every, self._windows.rows], "groups/earlier")  # (N, total)
        mates = self._mates(groups)
        masks: dict[int | None, ir.Value] = {}
        for window in dict.fromkeys(self._config.windows):
            name = "groups/mask" if window is None else f"groups/mask_{window}"
            if window is None:
                masks[window] = ops.op("Or", [earlier, mates], name)
                continue
            near = self._windows.near[window]
            # transformers' masks: a prompt that sees all of itself does so beyond the window, a picture within it
            if self._config.mask == "prefix":
                masks[window] = ops.op("Or", [ops.op("And", [earlier, near], f"{name}/causal"), mates], name)
            else:
                masks[window] = ops.op("And", [ops.op("Or", [earlier, mates], f"{name}/both"), near], name)
        return masks

    def _mates(self, groups: ir.Value) -> ir.Value:
        """Which rows of the cache are of a new row's group: bool (B, 1, 1, N, total); those of earlier runs never."""
        ops = self._ops
        absent = ops.constant("no_group", np.array(-1, np.int64))
        none, start = (
            ops.constant("first_axis", np.array([0], np.int64)),
            self._shaped(self._windows.past, [-1], "groups/past"),
        )
        pads = ops.op("Concat", [none, start, none, none], "groups/pads", axis=0)
        known = ops.op("Pad", [groups, pads, absent], "groups/known")  # (B, total)
        mine = self._shaped(groups, [0, 1, 1, -1, 1], "groups/mine")
        same = ops.op("Equal", [mine, self._shaped(known, [0, 1, 1, 1, -1], "groups/theirs")], "groups/same")
        return ops.op("And", [same, ops.op("GreaterOrEqual", [mine, self._zero], "groups/some")], "groups/mates")

    def _shaped(self, x: ir.Value, shape: list[int], name: str) -> ir.Value:
        numbers = self._ops.constant(f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        return self._ops.op("Reshape", [x, numbers], name)
