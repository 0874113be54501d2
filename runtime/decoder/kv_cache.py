"""Keys and values between steps, as OrtValues that are never copied through NumPy.

``GrowingCache`` feeds each step the tensors that the last one returned, one row longer each time: every step writes
the whole cache anew. ``SharedCache`` binds one buffer as past and present, and a step writes only its own rows; the
graph must allow it (GroupQueryAttention, which takes the length from the attention mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

_FIRST_CAPACITY = 256  # rows of a new shared buffer; doubled when full


class KvCache(Protocol):
    """The tensors [1, kv_heads, rows, head_dim] of every layer, key and value in turn."""

    length: int

    def bind(self, binding: Any, past: Sequence[str], present: Sequence[str], rows: int) -> None:
        """Bind inputs and outputs for a step that adds ``rows``; the outputs' order is ``present``'s."""
        ...

    def keep(self, outputs: Sequence[Any], rows: int) -> None:
        """Take over what the step gave."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        ...


class GrowingCache:
    """See the module. ``shape`` is (kv_heads, head_dim); ``tensors`` counts keys and values of all layers."""

    def __init__(self, tensors: int, shape: tuple[int, int], dtype: Any) -> None:
        self.length = 0
        heads, width = shape
        self._values = [_ort_value(np.zeros((1, heads, 0, width), dtype)) for _ in range(tensors)]

    def bind(self, binding: Any, past: Sequence[str], present: Sequence[str], rows: int) -> None:
        """See ``KvCache.bind``."""
        for name, value in zip(past, self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in present:
            binding.bind_output(name, "cpu")

    def keep(self, outputs: Sequence[Any], rows: int) -> None:
        """See ``KvCache.keep``."""
        self._values = list(outputs)
        self.length += rows

    def truncate(self, length: int) -> None:
        """See ``KvCache.truncate``."""
        if length < self.length:
            self._values = [_ort_value(np.ascontiguousarray(v.numpy()[:, :, :length])) for v in self._values]
            self.length = length


class SharedCache:
    """See the module. ``context`` bounds the buffer, which starts small and doubles."""

    def __init__(self, tensors: int, shape: tuple[int, int], dtype: Any, context: int) -> None:
        self.length = 0
        self._shape, self._dtype, self._context = shape, dtype, context
        self._capacity = min(_FIRST_CAPACITY, context)
        self._arrays = [self._empty() for _ in range(tensors)]
        self._values = [_ort_value(array) for array in self._arrays]

    def bind(self, binding: Any, past: Sequence[str], present: Sequence[str], rows: int) -> None:
        """See ``KvCache.bind``."""
        self._reserve(self.length + rows)
        for before, after, value in zip(past, present, self._values, strict=True):
            binding.bind_ortvalue_input(before, value)
            binding.bind_ortvalue_output(after, value)

    def keep(self, outputs: Sequence[Any], rows: int) -> None:
        """See ``KvCache.keep``: the rows are in the buffer already."""
        self.length += rows

    def truncate(self, length: int) -> None:
        """See ``KvCache.truncate``: what lies behind the length is never read."""
        self.length = min(self.length, length)

    def _empty(self) -> np.ndarray:
        return np.zeros((1, self._shape[0], self._capacity, self._shape[1]), self._dtype)

    def _reserve(self, rows: int) -> None:
        if rows <= self._capacity:
            return
        while self._capacity < rows:
            self._capacity = min(2 * self._capacity, max(self._context, rows))
        old, self._arrays = self._arrays, []
        for array in old:
            grown = self._empty()
            grown[:, :, : self.length] = array[:, :, : self.length]
            self._arrays.append(grown)
        self._values = [_ort_value(array) for array in self._arrays]


def _ort_value(array: np.ndarray) -> Any:
    """An OrtValue; onnxruntime wraps a contiguous CPU array without copying, so the array must outlive it."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
