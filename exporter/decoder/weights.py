"""The external data file of an ONNX model, written as the weights are read.

onnx and onnx-ir take whole tensors and write them at the end. Here each array goes to disk at once and only its place
stays in memory, so that the peak is one weight, not the model.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

# A large tensor starts on a page, so that it can be memory-mapped by itself; small ones share pages.
_PAGE, _LINE, _LARGE = 4096, 64, 65536


class WeightFile:
    """Use as a context manager; `add` writes an array and gives the tensor that stands for it in the graph."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def __enter__(self) -> WeightFile:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """Append a C-contiguous array of any numpy dtype that ONNX has."""
        align = _PAGE if array.nbytes >= _LARGE else _LINE
        padding = -self._offset % align
        self._file.write(b"\0" * padding)
        self._offset += padding
        self._file.write(np.ascontiguousarray(array).data)
        tensor = ir.ExternalTensor(
            self._path.name,
            self._offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )
        self._offset += array.nbytes
        return tensor
