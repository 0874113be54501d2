"""The few operators that scorers are written in, once as torch calls and once as ONNX nodes.

A scorer written against `Ops` is therefore one text with two meanings, operation for operation the same. The vocabulary
is that of ordinary ONNX operators every engine knows, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir
import torch

V = TypeVar("V")
Number = float | np.ndarray
OPSET = 18


class Ops(Protocol[V]):
    """Operators over values V; shapes broadcast as in NumPy, reductions keep their axes."""

    def constant(self, value: Number) -> V:
        """A float32 constant."""

    def add(self, a: V, b: V | Number) -> V: ...
    def sub(self, a: V | Number, b: V | Number) -> V: ...
    def mul(self, a: V, b: V | Number) -> V: ...
    def div(self, a: V, b: V | Number) -> V: ...
    def maximum(self, a: V, b: V | Number) -> V: ...
    def minimum(self, a: V, b: V | Number) -> V: ...
    def at_least(self, a: V, b: V | Number) -> V:
        """1.0 where a >= b, else 0.0."""

    def choose(self, a: V, bound: V | float, reached: V | float, otherwise: V | Number) -> V:
        """`reached` where a >= bound, else `otherwise`."""

    def matmul(self, a: V, b: V | np.ndarray) -> V: ...
    def transpose(self, a: V) -> V:
        """Swap the two axes of each matrix of a (B, rows, columns) batch."""

    def reshape(self, a: V, *sizes: int) -> V:
        """(B, ...) -> (B, *sizes), the numbers in the same order."""

    def zero_rows(self, a: V, count: int) -> V:
        """(B, T, D) -> (B, T + count, D): rows of zeros after the last."""

    def total(self, values: Sequence[V]) -> V:
        """Sum of equally shaped values, in order."""

    def abs(self, a: V) -> V: ...
    def exp(self, a: V) -> V: ...
    def log(self, a: V) -> V: ...
    def sqrt(self, a: V) -> V: ...
    def round(self, a: V) -> V:
        """To the nearest whole number, halves to even."""

    def sum(self, a: V, *axes: int) -> V: ...
    def mean(self, a: V, axis: int) -> V: ...
    def max(self, a: V, *axes: int) -> V: ...
    def min(self, a: V, axis: int) -> V: ...
    def norm(self, a: V, *axes: int) -> V:
        """Square root of the sum of squares."""

    def unsqueeze(self, a: V, axis: int) -> V: ...
    def squeeze(self, a: V, axis: int) -> V: ...
    def best(self, a: V) -> V:
        """(B, T) -> (B, 1) whole numbers: where the largest value is, the first of equal ones."""

    def row(self, a: V, index: V) -> V:
        """(B, T, D), (B, 1) of `best` -> (B, D): that row of each matrix."""

    def hits(self, indices: Sequence[V], size: int) -> V:
        """n indices (B, 1) of `best` -> (B, n, size): 1.0 where row i's index is, else 0.0."""


class TorchOps:
    """`Ops` on torch tensors."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    def constant(self, value: Number) -> torch.Tensor:
        return torch.as_tensor(np.asarray(value, np.float32), device=self.device)

    def _value(self, a: torch.Tensor | Number) -> torch.Tensor:
        return a if isinstance(a, torch.Tensor) else self.constant(a)

    def add(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return a + self._value(b)

    def sub(self, a: torch.Tensor | Number, b: torch.Tensor | Number) -> torch.Tensor:
        return self._value(a) - self._value(b)

    def mul(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return a * self._value(b)

    def div(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return a / self._value(b)

    def maximum(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return torch.maximum(a, self._value(b))

    def minimum(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return torch.minimum(a, self._value(b))

    def at_least(self, a: torch.Tensor, b: torch.Tensor | Number) -> torch.Tensor:
        return (a >= self._value(b)).float()

    def choose(
        self,
        a: torch.Tensor,
        bound: torch.Tensor | float,
        reached: torch.Tensor | float,
        otherwise: torch.Tensor | Number,
    ) -> torch.Tensor:
        return torch.where(a >= bound, self._value(reached), self._value(otherwise))

    def matmul(self, a: torch.Tensor, b: torch.Tensor | np.ndarray) -> torch.Tensor:
        return a @ self._value(b)

    def transpose(self, a: torch.Tensor) -> torch.Tensor:
        return a.transpose(-1, -2)

    def reshape(self, a: torch.Tensor, *sizes: int) -> torch.Tensor:
        return a.reshape(-1, *sizes)

    def zero_rows(self, a: torch.Tensor, count: int) -> torch.Tensor:
        return torch.nn.functional.pad(a, (0, 0, 0, count))

    def total(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        result = values[0]
        for value in values[1:]:
            result = result + value
        return result

    def abs(self, a: torch.Tensor) -> torch.Tensor:
        return a.abs()

    def exp(self, a: torch.Tensor) -> torch.Tensor:
        return a.exp()

    def log(self, a: torch.Tensor) -> torch.Tensor:
        return a.log()

    def sqrt(self, a: torch.Tensor) -> torch.Tensor:
        return a.sqrt()

    def round(self, a: torch.Tensor) -> torch.Tensor:
        return a.round()

    def sum(self, a: torch.Tensor, *axes: int) -> torch.Tensor:
        return a.sum(axes, keepdim=True)

    def mean(self, a: torch.Tensor, axis: int) -> torch.Tensor:
        return a.mean(axis, keepdim=True)

    def max(self, a: torch.Tensor, *axes: int) -> torch.Tensor:
        return a.amax(axes, keepdim=True)

    def min(self, a: torch.Tensor, axis: int) -> torch.Tensor:
        return a.amin(axis, keepdim=True)

    def norm(self, a: torch.Tensor, *axes: int) -> torch.Tensor:
        return (a * a).sum(axes, keepdim=True).sqrt()

    def unsqueeze(self, a: torch.Tensor, axis: int) -> torch.Tensor:
        return a.unsqueeze(axis)

    def squeeze(self, a: torch.Tensor, axis: int) -> torch.Tensor:
        return a.squeeze(axis)

    def best(self, a: torch.Tensor) -> torch.Tensor:
        return a.argmax(1, keepdim=True)

    def row(self, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return a[torch.arange(a.shape[0], device=a.device), index[:, 0]]

    def hits(self, indices: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.cat(list(indices), 1), size).float()


class OnnxOps:
    """`Ops` as nodes of an ONNX graph in the making: `nodes` and `initializers` hold what was written so far."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        return tuple(self._constants.values())

    def constant(self, value: Number) -> ir.Value:
        return self._array(np.asarray(value, np.float32))

    def _array(self, array: np.ndarray) -> ir.Value:
        """An initializer; equal ones are written once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def _op(self, op_type: str, *inputs: ir.Value | Number, **attributes: int | list[int]) -> ir.Value:
        values = [i if isinstance(i, ir.Value) else self.constant(i) for i in inputs]
        return self._tape.op(op_type, values, attributes or None)

    def _whole(self, numbers: Sequence[int]) -> ir.Value:
        return self._array(np.array(numbers, np.int64))

    def add(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Add", a, b)

    def sub(self, a: ir.Value | Number, b: ir.Value | Number) -> ir.Value:
        return self._op("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Mul", a, b)

    def div(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Div", a, b)

    def maximum(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Max", a, b)

    def minimum(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Min", a, b)

    def at_least(self, a: ir.Value, b: ir.Value | Number) -> ir.Value:
        return self._op("Cast", self._op("GreaterOrEqual", a, b), to=int(ir.DataType.FLOAT))

    def choose(
        self, a: ir.Value, bound: ir.Value | float, reached: ir.Value | float, otherwise: ir.Value | Number
    ) -> ir.Value:
        return self._op("Where", self._op("GreaterOrEqual", a, bound), reached, otherwise)

    def matmul(self, a: ir.Value, b: ir.Value | np.ndarray) -> ir.Value:
        return self._op("MatMul", a, b)

    def transpose(self, a: ir.Value) -> ir.Value:
        return self._op("Transpose", a, perm=[0, 2, 1])

    def reshape(self, a: ir.Value, *sizes: int) -> ir.Value:
        return self._op("Reshape", a, self._whole([0, *sizes]))

    def zero_rows(self, a: ir.Value, count: int) -> ir.Value:
        return self._op("Pad", a, self._whole([0, 0, 0, 0, count, 0]))

    def total(self, values: Sequence[ir.Value]) -> ir.Value:
        return self._op("Sum", *values)

    def abs(self, a: ir.Value) -> ir.Value:
        return self._op("Abs", a)

    def exp(self, a: ir.Value) -> ir.Value:
        return self._op("Exp", a)

    def log(self, a: ir.Value) -> ir.Value:
        return self._op("Log", a)

    def sqrt(self, a: ir.Value) -> ir.Value:
        return self._op("Sqrt", a)

    def round(self, a: ir.Value) -> ir.Value:
        return self._op("Round", a)

    def sum(self, a: ir.Value, *axes: int) -> ir.Value:
        return self._op("ReduceSum", a, self._whole(axes), keepdims=1)

    def mean(self, a: ir.Value, axis: int) -> ir.Value:
        return self._op("ReduceMean", a, self._whole([axis]), keepdims=1)

    def max(self, a: ir.Value, *axes: int) -> ir.Value:
        return self._op("ReduceMax", a, self._whole(axes), keepdims=1)

    def min(self, a: ir.Value, axis: int) -> ir.Value:
        return self._op("ReduceMin", a, self._whole([axis]), keepdims=1)

    def norm(self, a: ir.Value, *axes: int) -> ir.Value:
        return self._op("ReduceL2", a, self._whole(axes), keepdims=1)

    def unsqueeze(self, a: ir.Value, axis: int) -> ir.Value:
        return self._op("Unsqueeze", a, self._whole([axis]))

    def squeeze(self, a: ir.Value, axis: int) -> ir.Value:
        return self._op("Squeeze", a, self._whole([axis]))

    def best(self, a: ir.Value) -> ir.Value:
        return self._op("ArgMax", a, axis=1, keepdims=1)

    def row(self, a: ir.Value, index: ir.Value) -> ir.Value:
        return self._op("GatherND", a, index, batch_dims=1)

    def hits(self, indices: Sequence[ir.Value], size: int) -> ir.Value:
        joined = self.unsqueeze(self._op("Concat", *indices, axis=1), 2)  # (B, n, 1)
        same = self._op("Equal", joined, self._array(np.arange(size, dtype=np.int64)[None, None]))
        return self._op("Cast", same, to=int(ir.DataType.FLOAT))
