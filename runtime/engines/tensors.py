"""The inputs and outputs of a deserialised engine, and the shapes that its optimisation profiles take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.errors import BundleError

Shape = tuple[int, ...]
# TensorRT's names of the number formats that the bundle's graphs use at their ends.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name, dtype: as in the graph.
        shape: -1 where it may vary.
        is_input: otherwise an output.
        on_host: the engine reads or writes it in the computer's memory, not the GPU's (a shape given as values).
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    is_input: bool
    on_host: bool


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: the least, the likely (it is tuned for that) and the greatest shape of each input."""

    index: int
    least: dict[str, Shape]
    likely: dict[str, Shape]
    most: dict[str, Shape]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether these shapes, one for each input, are within it."""
        return all(
            len(shape) == len(self.most[name])
            and all(
                low <= size <= high for low, size, high in zip(self.least[name], shape, self.most[name], strict=True)
            )
            for name, shape in shapes.items()
        )

    @property
    def room(self) -> int:
        """How many numbers its greatest inputs hold."""
        return sum(int(np.prod(shape)) for shape in self.most.values())


def read_tensors(trt: Installation, engine: Any, where: str) -> dict[str, Tensor]:
    """The engine's inputs and outputs by name.

    Args:
        engine: an ``ICudaEngine``. where: the engine's file, for the message.

    Raises:
        BundleError: a number format that the runtime does not know.
    """
    tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise BundleError(f"{where} has {name} of type {kind}, which this svdprune does not know: build it again")
        tensors[name] = Tensor(
            name,
            np.dtype(_DTYPES[kind]),
            tuple(engine.get_tensor_shape(name)),
            engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.module.TensorLocation.HOST,
        )
    return tensors


def read_profiles(engine: Any, tensors: Mapping[str, Tensor]) -> list[Profile]:
    """The engine's optimisation profiles; an engine of fixed shapes has one."""
    inputs = [tensor for tensor in tensors.values() if tensor.is_input]
    profiles = []
    for index in range(max(1, engine.num_optimization_profiles)):
        least, likely, most = {}, {}, {}
        for tensor in inputs:
            if -1 in tensor.shape:
                shapes = engine.get_tensor_profile_shape(tensor.name, index)
                least[tensor.name], likely[tensor.name], most[tensor.name] = map(tuple, shapes)
            else:
                least[tensor.name] = likely[tensor.name] = most[tensor.name] = tensor.shape
        profiles.append(Profile(index, least, likely, most))
    return profiles


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile | None:
    """The profile tuned for exactly these shapes, else the first of the smallest ones; None where none takes them."""
    fitting = [profile for profile in profiles if profile.takes(shapes)]
    return min(fitting, key=lambda item: (item.likely != shapes, item.room), default=None)
