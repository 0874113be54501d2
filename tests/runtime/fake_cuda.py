# ruff: noqa: N802, N803, N815 (the names are CUDA's)
"""CUDA without a GPU: ``cuda.bindings.runtime`` with the calls that the runtime makes, over memory of its own.

What would be wrong on a GPU is wrong here: work on a stream is put off until the stream is waited for, addresses of the
GPU are no addresses of the computer (a copy in the wrong direction, or beyond an allocation, fails the test), copies
from memory that is not pinned are told apart, what is captured runs only when its graph is launched, and double frees
and leaks are counted. ``tests/runtime/test_engine_device.py`` holds that the real binding has every name used here.

    cuda = install(monkeypatch, FakeCuda(sm=87))
    run_engines(cuda, trt)          # fake_trt's engines compute on this memory, by ONNX Runtime
"""

from __future__ import annotations

import bisect
import ctypes
import enum
import hashlib
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

NAME = "cuda.bindings.runtime"
_BASE, _ALIGN = 0x7F00_0000_0000_0000, 512  # no address of a process on this machine


class Error(enum.IntEnum):
    """The error codes that the fake returns, of cudaError_t."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


WORDS = {
    Error.cudaErrorMemoryAllocation: b"out of memory",
    Error.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    Error.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    Error.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
    Error.cudaErrorStreamCaptureUnsupported: b"operation not permitted when stream is capturing",
}
Kind = enum.IntEnum(
    "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
)
Attribute = enum.IntEnum(
    "cudaDeviceAttr",
    {"cudaDevAttrIntegrated": 18, "cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76},
)
CaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
Work = Callable[[], None]


class FakeCuda(types.ModuleType):
    """The module.

    Attributes:
        sm: the GPU's compute capability times ten.
        devices: how many GPUs there are.
        broken: the error that every call gives, for a machine without a GPU or driver.
        total: bytes of GPU memory.
        refuse_capture: capturing work fails with cudaErrorStreamCaptureUnsupported.
        fail_next: the error that the next wait for the stream gives.
        calls: how often each function was called.
        copies: bytes copied, by kind of copy.
        launches: how many graphs were launched.
    """

    cudaSuccess = Error.cudaSuccess
    cudaMemcpyKind = Kind
    cudaDeviceAttr = Attribute
    cudaStreamCaptureMode = CaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDefault = 0

    def __init__(self, sm: int = 87, total: int = 1 << 30) -> None:
        super().__init__(NAME)
        self.sm, self.total, self.devices = sm, total, 1
        self.broken: Error | None = None
        self.refuse_capture = False
        self.fail_next: Error | None = None
        self.calls: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.launches = 0
        self.memory: dict[int, np.ndarray] = {}  # GPU address -> bytes
        self.pinned: dict[int, np.ndarray] = {}  # real address -> bytes
        self._next = _BASE
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._clock = 0.0
        self._streams: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            self.calls[name] += 1
            if self.broken is not None and not name.startswith("cudaGetError"):
                return lambda *_: (self.broken, None)
        return value

    # ---- for the tests -----------------------------------------------------------------------------------------------
    def view(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address of the GPU."""
        starts = sorted(self.memory)
        index = bisect.bisect_right(starts, address) - 1
        assert index >= 0, f"{address:#x} is no address of the GPU"
        start = starts[index]
        held = self.memory[start]
        assert address + nbytes <= start + len(held), f"{nbytes} bytes at {address:#x} are beyond their allocation"
        return held[address - start : address - start + nbytes]

    def enqueue(self, work: Work) -> None:
        """Put work on the stream, or into the graph that is being captured."""
        (self._queue if self._captured is None else self._captured).append(work)

    @property
    def held(self) -> int:
        """Bytes of GPU memory that are allocated."""
        return sum(map(len, self.memory.values()))

    # ---- device ------------------------------------------------------------------------------------------------------
    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.devices

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess if 0 <= device < self.devices else Error.cudaErrorInvalidValue,)

    def cudaDeviceGetAttribute(self, attr: Attribute, device: int) -> tuple[Any, ...]:
        values = {"Integrated": int(self.sm in (87, 110)), "Major": self.sm // 10, "Minor": self.sm % 10}
        return Error.cudaSuccess, next(value for name, value in values.items() if attr.name.endswith(name))

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, types.SimpleNamespace(name=b"Fake GPU")

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.total - self.held, self.total

    def cudaGetErrorName(self, error: Error) -> tuple[Any, ...]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> tuple[Any, ...]:
        return Error.cudaSuccess, WORDS.get(error, b"an error of the fake")

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.held + size > self.total:
            return Error.cudaErrorMemoryAllocation, None
        address, self._next = self._next, self._next + -(-size // _ALIGN) * _ALIGN + _ALIGN
        self.memory[address] = np.full(size, 0xFF, np.uint8)  # NaN in every float format: nothing is zero by luck
        return Error.cudaSuccess, address

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        assert pointer in self.memory, "freed twice, or never allocated"
        self._run()
        del self.memory[pointer]
        return (Error.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        held = np.full(size, 0xFF, np.uint8)
        self.pinned[held.ctypes.data] = held
        return Error.cudaSuccess, held.ctypes.data

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        assert pointer in self.pinned, "freed twice, or never allocated"
        self._run()
        del self.pinned[pointer]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Kind, stream: int) -> tuple[Any, ...]:
        self._check(stream)
        self.copies[kind.name.removeprefix("cudaMemcpy")] += count
        if kind.name == "cudaMemcpyHostToDevice":
            assert self._is_pinned(src, count), "a copy to the GPU from memory that is not pinned"
        read = self._host if kind.name == "cudaMemcpyHostToDevice" else self.view
        write = self._host if kind.name == "cudaMemcpyDeviceToHost" else self.view
        write(dst, count), read(src, count)  # both exist now

        def copy() -> None:
            write(dst, count)[:] = read(src, count)

        self.enqueue(copy)
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        self._check(stream)
        self.enqueue(lambda: self.view(devPtr, count).fill(value))
        return (Error.cudaSuccess,)

    def cudaMemset2DAsync(
        self, devPtr: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any, ...]:
        self._check(stream)
        assert width <= pitch
        for row in range(height):
            self.enqueue(lambda at=devPtr + row * pitch: self.view(at, width).fill(value))  # type: ignore[misc]
        return (Error.cudaSuccess,)

    def _host(self, address: int, nbytes: int) -> np.ndarray:
        assert address < _BASE, "an address of the GPU where one of the computer is meant"
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.uint8)

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + len(held) for start, held in self.pinned.items())

    # ---- streams, events, graphs -------------------------------------------------------------------------------------
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self._next += _ALIGN
        self._streams.add(self._next)
        return Error.cudaSuccess, self._next

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self._check(stream)
        self._streams.remove(int(stream))
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._check(stream)
        assert self._captured is None, "a captured stream cannot be waited for"
        self._run()
        error, self.fail_next = self.fail_next or Error.cudaSuccess, None
        return (error,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, types.SimpleNamespace(at=None)

    def cudaEventRecord(self, event: Any, stream: int) -> tuple[Any, ...]:
        self._check(stream)

        def record() -> None:
            self._clock += 1.0
            event.at = self._clock

        self.enqueue(record)
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        self._run()
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        return Error.cudaSuccess, end.at - start.at

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Any, ...]:
        self._check(stream)
        assert self._captured is None
        self._captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        captured, self._captured = self._captured, None
        assert captured is not None
        if self.refuse_capture:
            return Error.cudaErrorStreamCaptureUnsupported, None
        return Error.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, types.SimpleNamespace(work=list(graph), alive=True)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any, ...]:
        self._check(stream)
        assert graph.alive, "a graph that was destroyed"
        self.launches += 1
        for work in graph.work:
            self.enqueue(work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        assert graph.alive, "destroyed twice"
        graph.alive = False
        return (Error.cudaSuccess,)

    def _check(self, stream: int) -> None:
        assert int(stream) in self._streams, "no such stream"

    def _run(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    """Make ``import cuda.bindings.runtime`` give the fake; returned for convenience."""
    monkeypatch.setitem(sys.modules, NAME, cuda)
    return cuda


def run_engines(cuda: FakeCuda, trt: Any) -> None:
    """Let the engines of a module of ``fake_trt`` compute on the fake's memory, in the order of its stream."""
    sessions: dict[bytes, Any] = {}

    def compute(model: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import onnxruntime

        key = hashlib.sha256(model).digest()
        if key not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            sessions[key] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in sessions[key].get_outputs()]
        return dict(zip(names, sessions[key].run(names, feeds), strict=True))

    def execute(execution: Any) -> bool:
        context, changes = execution.context, execution.context._changes

        def work() -> None:
            assert context._changes == changes, "the context was changed since this was enqueued or captured"
            feeds = {
                name: cuda.view(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape).copy()
                for name, (address, shape, dtype) in execution.inputs.items()
            }
            outputs = compute(execution.model, feeds)
            for name, (address, shape, dtype) in execution.outputs.items():
                assert outputs[name].shape == shape and outputs[name].dtype == dtype
                raw = np.ascontiguousarray(outputs[name]).reshape(-1).view(np.uint8)
                cuda.view(address, raw.nbytes)[:] = raw

        cuda._check(execution.stream)
        if cuda._captured is not None:
            assert context._settled, "captured before the run that follows a change of shapes"
        context._settled = True
        cuda.enqueue(work)
        return True

    trt.fake.execute = execute
