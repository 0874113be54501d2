"""CUDA for the engine backends: memory, one stream, events, graphs. Nothing of it is imported before a ``Device``.

All work goes to one stream that is not the default one, so what is enqueued runs in that order; ``synchronize`` waits
for all of it. The calls are those of ``cuda.bindings.runtime`` (CUDA 12.6 and later).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.engines.faults import explain
from svdprune.runtime.engines.handles import Buffer, Event, Graph
from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.lazy import require

CUDA = "cuda.bindings.runtime"
_OUT_OF_MEMORY = 2
_NO_GPU = (34, 35, 36, 46, 100, 101, 802, 803, 804)  # a missing, old, stubbed, busy or mismatched driver, or no device


class CudaError(SvdpruneError):
    """A CUDA call that failed. ``code`` is cudaError_t's number."""

    def __init__(self, code: int, sentence: str) -> None:
        self.code = code
        super().__init__(sentence)


class NoGpu(UserError):
    """This machine has no GPU that CUDA can use."""


class Device:
    """The GPU that CUDA numbers 0 (CUDA_VISIBLE_DEVICES chooses which that is).

    Args:
        extra: svdprune's extra that brings the binding, for the sentence where it is missing.

    Attributes:
        name: "NVIDIA Thor".
        sm: compute capability times ten.
        integrated: whether it shares its memory with the CPU (Jetson).

    Raises:
        MissingDependency: the binding is not installed.
        NoGpu: no GPU, or no driver that fits.
    """

    def __init__(self, extra: str = "tensorrt") -> None:
        try:
            self._cuda: Any = require(CUDA, extra, "running an engine")
            count = self.call("cudaGetDeviceCount")
        except (RuntimeError, ImportError) as error:  # how cuda.bindings 12 reports a driver library that is missing
            raise _no_gpu(str(error)) from error
        if not count:
            raise _no_gpu("CUDA counts no device")
        self.call("cudaSetDevice", 0)
        kind = self._cuda.cudaDeviceAttr
        major = self._attribute(kind.cudaDevAttrComputeCapabilityMajor)
        self.sm = 10 * major + self._attribute(kind.cudaDevAttrComputeCapabilityMinor)
        self.integrated = bool(self._attribute(kind.cudaDevAttrIntegrated))
        name = self.call("cudaGetDeviceProperties", 0).name
        self.name = name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)
        handle = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._stream = int(handle)
        self._closed = weakref.finalize(self, _destroy_stream, self._cuda, handle)
        self._closed.atexit = False

    @property
    def stream(self) -> int:
        """Handle of the stream that all work goes to.

        Raises:
            UserError: the device was closed.
        """
        if not self._closed.alive:
            raise UserError("the GPU was closed: copy what is wanted of it to the host before that")
        return self._stream

    # ---- memory ------------------------------------------------------------------------------------------------------
    def memory(self) -> tuple[int, int]:
        """Free and all memory of the GPU, in bytes."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int, what: str) -> Buffer:
        """GPU memory of ``nbytes``; ``what`` is told where there is too little ("the KV cache").

        Raises:
            UserError: not that much is free.
        """
        return self._allocate("cudaMalloc", "cudaFree", nbytes, what)

    def pinned(self, nbytes: int, what: str) -> Buffer:
        """Memory of the computer that copies to and from the GPU need not stage.

        Raises:
            UserError: not that much is free.
        """
        return self._allocate("cudaMallocHost", "cudaFreeHost", nbytes, what)

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from pinned memory to the GPU."""
        self._copy(target, source, nbytes, "cudaMemcpyHostToDevice")

    def fetch(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from the GPU to pinned memory."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy within the GPU."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice")

    def download(self, array: DeviceArray) -> np.ndarray:
        """A copy of ``array`` in the computer's memory, after all that is enqueued."""
        made = np.empty(array.shape, array.dtype)
        if made.nbytes:
            self.fetch(made.ctypes.data, array.pointer, made.nbytes)
        self.synchronize()
        return made

    def clear(self, pointer: int, nbytes: int) -> None:
        """Enqueue zeros for ``nbytes`` of GPU memory."""
        self.call("cudaMemsetAsync", pointer, 0, nbytes, self.stream)

    def clear_rows(self, pointer: int, pitch: int, width: int, count: int) -> None:
        """Enqueue zeros for ``width`` bytes at ``pointer``, and again ``pitch`` bytes further, ``count`` times."""
        self.call("cudaMemset2DAsync", pointer, pitch, 0, width, count, self.stream)

    # ---- order and time ----------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        """Wait for all that is enqueued.

        Raises:
            CudaError: something of it failed.
        """
        self.call("cudaStreamSynchronize", self.stream)

    def event(self) -> Event:
        """Mark this moment in the stream."""
        event = Event(self, self.call("cudaEventCreateWithFlags", self._cuda.cudaEventDefault))
        self.call("cudaEventRecord", event.handle, self.stream)
        return event

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` enqueues, as a graph; it is not run.

        Raises:
            CudaError: the work, or this driver, does not allow it; the stream is as before.
        """
        self.call(
            "cudaStreamBeginCapture", self.stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            work()
        except BaseException:
            error, graph = self._cuda.cudaStreamEndCapture(self.stream)
            if not int(error) and graph is not None:
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()  # a failed capture leaves its error for the next call to find
            raise
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return Graph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def close(self) -> None:
        """Give the stream back. Memory is its owners' matter."""
        self._closed()

    # ---- calls -------------------------------------------------------------------------------------------------------
    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime; its result, a tuple where there are several.

        Raises:
            CudaError: it failed.
            NoGpu: it failed because there is no GPU, or no driver that fits.
        """
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error):
            self._cuda.cudaGetLastError()  # told once: not again by the next call
            raise self._fault(name, int(error), error)
        return results[0] if len(results) == 1 else tuple(results)

    def _allocate(self, allocate: str, release: str, nbytes: int, what: str) -> Buffer:
        size = max(int(nbytes), 1)
        try:
            pointer = self.call(allocate, size)
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            free, total = self.memory()
            raise UserError(
                f"{what} needs {_mb(size)} of memory and {_mb(free)} of {_mb(total)} are free on {self.name}: "
                "close other programs, or build for a smaller batch or a shorter cache"
            ) from error
        return Buffer(self, int(pointer), size, getattr(self._cuda, release))

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        self.call("cudaMemcpyAsync", target, source, nbytes, getattr(self._cuda.cudaMemcpyKind, kind), self.stream)

    def _attribute(self, kind: Any) -> int:
        return int(self.call("cudaDeviceGetAttribute", kind, 0))

    def _fault(self, call: str, code: int, error: Any) -> SvdpruneError:
        _, name = self._cuda.cudaGetErrorName(error)
        _, words = self._cuda.cudaGetErrorString(error)
        text = f"CUDA error {code} ({_text(name)}) in {call}: {_text(words)}"
        if code in _NO_GPU:
            return _no_gpu(text)
        return CudaError(code, explain(text) or f"{text}: check the driver, and that no other program crashed the GPU")


def _no_gpu(text: str) -> NoGpu:
    advice = "run engines on a machine with an NVIDIA GPU and its driver, or use the backend `onnxruntime`"
    return NoGpu(explain(text) or f"this machine has no GPU that CUDA can use ({text}): {advice}")


def _destroy_stream(cuda: Any, handle: Any) -> None:
    cuda.cudaStreamDestroy(handle)


def _text(words: Any) -> str:
    return words.decode(errors="replace") if isinstance(words, bytes) else str(words)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
