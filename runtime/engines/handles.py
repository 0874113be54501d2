"""What a ``Device`` hands out: memory, events, graphs. Each is given back when it is freed or no longer used."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import UserError

if TYPE_CHECKING:
    from svdprune.runtime.engines.device import Device


class Buffer:
    """Memory of the GPU, or pinned memory of the computer, freed by ``free`` or with the object.

    Attributes:
        device: whose it is.
        nbytes: its size.
    """

    def __init__(self, device: Device, pointer: int, nbytes: int, free: Callable[[int], object]) -> None:
        self.device, self.nbytes = device, nbytes
        self._pointer = pointer
        self._freed = weakref.finalize(self, free, pointer)
        self._freed.atexit = False  # the driver may be gone by then, and the process's memory goes with it

    @property
    def pointer(self) -> int:
        """Its address.

        Raises:
            UserError: it was freed.
        """
        if not self._freed.alive:
            raise UserError("what this array belongs to was closed: copy it to the host (`host()`) before that")
        return self._pointer

    def free(self) -> None:
        """Give it back now; again is harmless."""
        self._freed()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Its first bytes as a NumPy array; for pinned memory only."""
        raw = (ctypes.c_ubyte * self.nbytes).from_address(self.pointer)
        count = int(np.prod(shape))
        return np.frombuffer(memoryview(raw), dtype=dtype, count=count).reshape(shape)


class Loan:
    """An output left in GPU memory: in the session's buffer, or set aside when a run is about to overwrite it."""

    def __init__(self, device: Device, buffer: Buffer, nbytes: int) -> None:
        self.device = device
        self._buffer, self._nbytes = buffer, nbytes

    @property
    def pointer(self) -> int:
        """The address now."""
        return self._buffer.pointer

    def set_aside(self) -> None:
        """Move it to memory of its own, in the order of the stream."""
        mine = self.device.malloc(self._nbytes, "an output that is still in use")
        self.device.copy(mine.pointer, self._buffer.pointer, self._nbytes)
        self._buffer = mine


class Event:
    """A moment in a device's stream; ``Device.event`` makes one."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self.handle = device, handle
        self._freed = weakref.finalize(self, device.call, "cudaEventDestroy", handle)
        self._freed.atexit = False

    def seconds_since(self, start: Event) -> float:
        """The GPU's time from ``start`` to this event, which is waited for."""
        self._device.call("cudaEventSynchronize", self.handle)
        return float(self._device.call("cudaEventElapsedTime", start.handle, self.handle)) / 1e3


class Graph:
    """A captured CUDA graph, ready to launch."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle
        self._freed = weakref.finalize(self, device.call, "cudaGraphExecDestroy", handle)
        self._freed.atexit = False

    def launch(self) -> None:
        """Enqueue all that was captured."""
        self._device.call("cudaGraphLaunch", self._handle, self._device.stream)

    def free(self) -> None:
        """Give it back now."""
        self._freed()
