"""Vision graphs and decoders as Polygraphy's runners.

A graph on ONNX Runtime runs in Polygraphy's ``OnnxrtRunner``. What else the runtime has - an engine with its buffers
and CUDA graphs, a decoder with its cache - gets the same methods here, so that it is timed and compared as it really
runs and not as a runner of its own would run it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from svdprune.runtime.arrays import AnyArray
from svdprune.runtime.lazy import require
from svdprune.runtime.manifest import VisionInfo

Feed = Mapping[str, np.ndarray]
Call = Callable[[Feed], Mapping[str, AnyArray]]


class Runner(Protocol):
    """What is used of ``polygraphy.backend.base.BaseRunner``, between ``with runner:`` and its end."""

    name: str

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, feed_dict: Any, check_inputs: bool = True) -> Mapping[str, Any]:
        """Outputs by name; buffers may be used again by the next call."""
        ...

    def last_inference_time(self) -> float:
        """Seconds of the last ``infer``."""
        ...


class CallRunner:
    """A runner over any function from inputs to outputs.

    Args:
        name: shown in reports.
        inputs: shape (None where it varies) and dtype of each input, by name.
        opened: entered with the runner: gives the function, and closes what that needs in the end.
    """

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, tuple[tuple[int | None, ...], np.dtype[Any]]],
        opened: Callable[[], AbstractContextManager[Call]],
    ) -> None:
        self.name = name
        self._inputs, self._opened = dict(inputs), opened
        self._closing = ExitStack()
        self._seconds = 0.0

    def __enter__(self) -> CallRunner:
        self._call = self._closing.enter_context(self._opened())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def get_input_metadata(self, use_numpy_dtypes: bool | None = None) -> Any:
        """The inputs as Polygraphy's ``TensorMetadata``."""
        metadata = polygraphy("polygraphy.common").TensorMetadata()
        for name, (shape, dtype) in self._inputs.items():
            metadata.add(name, dtype=dtype, shape=shape)
        return metadata

    def infer(self, feed_dict: Any, check_inputs: bool = True) -> Mapping[str, AnyArray]:
        """See ``Runner.infer``."""
        began = time.perf_counter()
        outputs = OrderedDict(self._call(feed_dict))
        self._seconds = time.perf_counter() - began
        return outputs

    def last_inference_time(self) -> float:
        """See ``Runner.last_inference_time``."""
        return self._seconds


def pixels_of(info: VisionInfo) -> tuple[tuple[int | None, ...], np.dtype[Any]]:
    """Shape and dtype of a vision graph's input."""
    size = (info.height, info.width, 3) if info.input == "uint8" else (3, info.height, info.width)
    return (None, *size), np.dtype(info.input)


def inputs_of(info: VisionInfo) -> dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]:
    """Shape and dtype of every input of a vision graph."""
    inputs = {"pixels": pixels_of(info)}
    if info.tiles is not None:
        shape = (None if info.tiles.budget == "tile" else 1, info.tokens, info.tiles.sources)
        for name, rest in info.tiles.extras.items():
            inputs[name] = ((None, *rest), np.dtype(np.float32))
        inputs |= {"sources": (shape, np.dtype(np.int64)), "weights": (shape, np.dtype(np.float32))}
    return inputs


def onnxrt_runner(session: Any, name: str) -> Runner:
    """Polygraphy's runner over an ``onnxruntime.InferenceSession``."""
    runner: Runner = polygraphy("polygraphy.backend.onnxrt").OnnxrtRunner(session, name=name)
    return runner


def polygraphy(module: str) -> Any:
    """A module of Polygraphy.

    Raises:
        MissingDependency: it is not installed.
    """
    return require(module, extra="profile", feature="profiling and comparing")


@contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy says nothing of its own in the block: what it finds is reported here."""
    with polygraphy("polygraphy.logger").G_LOGGER.verbosity():
        yield
