"""What a selector costs, counted by running its own text on shapes instead of numbers.

`Counting` is the third meaning of `svdprune.exporter.selection.ops.Ops`, beside torch and ONNX: its values are shapes,
and each operator writes down its work. So a change of a scorer changes its cost here without a second formula.

Every matrix product and every reduction is a kernel that waits for the one before; a run of pointwise operators is one
kernel, since engines fuse those. The selection is float32 whatever the encoder is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.selection.registry import Task, selector_entry
from svdprune.runtime.roofline import Work

Shape = tuple[int, ...]
BYTES = 4  # of a float32


class Counting:
    """`Ops` on shapes; `works` holds what was done so far, in order."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self._fusing = False

    def _shape(self, value: Any) -> Shape:
        return value if isinstance(value, tuple) else tuple(np.shape(value))

    def _kernel(self, name: str, inputs: Sequence[Shape], output: Shape, flops: int = 0) -> Shape:
        moved = BYTES * (sum(map(math.prod, inputs)) + math.prod(output))
        self.works.append(Work(name, flops=flops, moved=moved, precision="fp32"))
        self._fusing = False
        return output

    def _pointwise(self, *values: Any) -> Shape:
        shapes = [self._shape(value) for value in values]
        output = tuple(np.broadcast_shapes(*shapes))
        if not self._fusing:
            self._kernel("pointwise", [shape for shape in shapes if shape], output)
            self._fusing = True
        return output

    def _reduction(self, a: Shape, *axes: int) -> Shape:
        return self._kernel("reduction", [a], tuple(1 if axis in axes else size for axis, size in enumerate(a)))

    def constant(self, value: Any) -> Shape:
        return tuple(np.shape(value))

    def add(self, a: Any, b: Any) -> Shape:
        return self._pointwise(a, b)

    sub = mul = div = maximum = minimum = at_least = add

    def choose(self, a: Shape, bound: Any, reached: Any, otherwise: Any) -> Shape:
        return self._pointwise(a, bound, reached, otherwise)

    def reshape(self, a: Shape, *sizes: int) -> Shape:
        return (a[0], *sizes)

    def zero_rows(self, a: Shape, count: int) -> Shape:
        return self._kernel("pad", [a], (a[0], a[1] + count, a[2]))

    def total(self, values: Sequence[Shape]) -> Shape:
        return self._kernel("pointwise", values, values[0])

    def abs(self, a: Shape) -> Shape:
        return self._pointwise(a)

    exp = abs  # noqa: A003  (as all those of `Ops`)
    log = abs  # noqa: A003
    sqrt = abs  # noqa: A003
    round = abs  # noqa: A003

    def matmul(self, a: Shape, b: Any) -> Shape:
        other = self._shape(b)
        output = (*np.broadcast_shapes(a[:-2], other[:-2]), a[-2], other[-1])
        return self._kernel("matrix product", [a, other], output, flops=2 * math.prod(output) * a[-1])

    def transpose(self, a: Shape) -> Shape:
        """Free: a matrix product reads its operand either way."""
        return (*a[:-2], a[-1], a[-2])

    def sum(self, a: Shape, *axes: int) -> Shape:
        return self._reduction(a, *axes)

    max = sum  # noqa: A003
    norm = sum  # noqa: A003

    def mean(self, a: Shape, axis: int) -> Shape:
        return self._reduction(a, axis)

    min = mean

    def unsqueeze(self, a: Shape, axis: int) -> Shape:
        return (*a[:axis], 1, *a[axis:])

    def squeeze(self, a: Shape, axis: int) -> Shape:
        return (*a[:axis], *a[axis + 1 :])

    def best(self, a: Shape) -> Shape:
        return self._reduction(a, 1)

    def row(self, a: Shape, index: Shape) -> Shape:
        return self._kernel("gather", [index, (a[0], a[2])], (a[0], a[2]))

    def hits(self, indices: Sequence[Shape], size: int) -> Shape:
        return self._kernel("pointwise", indices, (indices[0][0], len(indices), size))


def selection_work(
    config: SelectorConfig,
    tokens: int,
    channels: int,
    keep: int,
    batch: int,
    grid: tuple[int, int],
    gpu: bool = False,
    start: np.ndarray | None = None,
    padded: bool = False,
) -> list[Work]:
    """The scorer, the top K and the gather: features float32 (batch, tokens, channels), of which `keep` rows stay.

    `gpu`, `start` and `padded` are those of `svdprune.exporter.selection.build_selector`.
    """
    task = Task(config, tokens, channels, grid, keep, start, padded, gpu)
    op = Counting()
    selector_entry(config.name).scorer(op, (batch, tokens, channels), (batch, tokens), task)
    op._kernel("top k", [(batch, tokens)], (batch, 2 * keep))
    op._kernel("top k", [(batch, keep)], (batch, 2 * keep))  # sorted again by place
    op._kernel("gather", [(batch, keep, channels)], (batch, keep, channels))
    return op.works
