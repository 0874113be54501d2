"""A deserialised engine ready to run: buffers allocated once, CUDA graphs where shapes come again.

What ``run`` gives is the same whichever way the engine was enqueued. Inputs and outputs live in GPU memory of the
session, as large as the optimisation profiles allow. Exceptions are tensors updated in place (a KV cache): an output
and the input it updates are one buffer, which the caller brings.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from svdprune.runtime.arrays import AnyArray, DeviceArray
from svdprune.runtime.engines.contexts import Contexts
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.handles import Buffer, Loan
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.progress import BuildLog
from svdprune.runtime.engines.tensors import Profile, Shape, Tensor, read_profiles, read_tensors
from svdprune.runtime.errors import BundleError, UserError

_ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address at most


@dataclass(frozen=True)
class Pieces:
    """An input of ``shape`` put together from arrays that follow one another in memory, wherever they lie."""

    shape: Shape
    arrays: Sequence[AnyArray]


Feed = AnyArray | Pieces


class EngineSession:
    """See the module. Not for several threads at once.

    Args:
        trt: the library that built the engine.
        data: the serialised engine: bytes, or anything else with the buffer protocol (a memory map).
        device: where it runs.
        where: what to call the engine in messages, its path as a rule.
        shapes: greatest shapes that inputs will have, where that is less than the profiles allow.
        alias: output -> input, for tensors that are updated in place.
        host_code: the engine may hold code for the CPU (version-compatible engines do).

    Attributes:
        tensors: inputs and outputs by name.
        profiles: the optimisation profiles.
        largest: greatest shape of each input and output.

    Raises:
        EngineFault, UserError: the engine cannot be read here, or memory is short.
        BundleError: it has a tensor of a type that the runtime does not know, or lacks one that ``alias`` names.
    """

    def __init__(
        self,
        trt: Installation,
        data: Any,
        device: Device,
        where: str,
        shapes: Mapping[str, Shape] | None = None,
        alias: Mapping[str, str] | None = None,
        host_code: bool = False,
    ) -> None:
        self.device, self.where = device, where
        self._alias = dict(alias or {})
        log = BuildLog()
        self._engine: Any = trt.deserialize(data, host_code, log)
        self.tensors: dict[str, Tensor] = read_tensors(trt, self._engine, where)
        self.profiles: list[Profile] = read_profiles(self._engine, self.tensors)
        for name in (*self._alias, *self._alias.values()):
            if name not in self.tensors:
                raise BundleError(f"{where} has no tensor {name}: build it again")
        self._shared = {*self._alias, *self._alias.values()}
        self._loans: dict[str, weakref.ref[Loan]] = {}
        self._buffers: dict[str, Buffer] = {}
        self._staging: dict[str, Buffer] = {}
        self._given: list[Buffer] = []
        self._busy = False
        self._contexts = Contexts(trt, self._engine, device, self.tensors, self.profiles, where, log)
        try:
            self.largest = self._contexts.greatest(shapes or {})
            for name, tensor in self.tensors.items():
                if name not in self._shared:
                    make = device.pinned if tensor.on_host else device.malloc
                    self._buffers[name] = make(self._size(name), f"{where} (its {name})")
        except BaseException:
            self.close()
            raise

    def run(
        self,
        inputs: Mapping[str, Feed],
        in_place: Mapping[str, DeviceArray] | None = None,
        on_device: Collection[str] = (),
        repeats: bool = False,
    ) -> dict[str, AnyArray]:
        """Run once and wait for the end.

        Args:
            inputs: each input that is not updated in place, of the engine's number format.
            in_place: inputs whose memory the engine reads and updates where it lies.
            on_device: outputs to leave in GPU memory; they stay valid, whatever is run later, until ``close``.
            repeats: these shapes will come again: capture a CUDA graph at their second run and use it from then on.

        Returns:
            Each output that is not an alias, by name.

        Raises:
            EngineFault, CudaError: the run failed.
            UserError: a shape that the engine was not built for, or the session was closed.
        """
        if self._engine is None:
            raise UserError(f"{self.where} was closed: load the bundle again")
        held = in_place or {}
        shapes: dict[str, Shape] = {name: tuple(feed.shape) for name, feed in {**inputs, **held}.items()}
        wanted = {name for name, tensor in self.tensors.items() if tensor.is_input}
        if set(shapes) != wanted:
            raise ValueError(f"{self.where} takes {sorted(wanted)}, not {sorted(shapes)}")
        lane = self._contexts.find(shapes, repeats)
        if lane is None or any(_exceeds(shape, self.largest[name]) for name, shape in shapes.items()):
            asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name in inputs)
            most = ", ".join(f"{name} {list(self.largest[name])}" for name in inputs)
            raise UserError(f"{self.where} was built for at most {most}, not for {asked}: build it for larger shapes")
        self._settle()
        self._busy = True
        for name, feed in inputs.items():
            self._fill(self.tensors[name], feed)
        addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}
        addresses |= {name: array.pointer for name, array in held.items()}
        addresses |= {output: addresses[source] for output, source in self._alias.items()}
        lane.prepare(shapes, addresses)
        lane.run()
        outputs: dict[str, AnyArray] = {}
        for name, tensor in self.tensors.items():
            if not tensor.is_input and name not in self._shared:
                shape = lane.output_shape(name)
                outputs[name] = self._lend(tensor, shape) if name in on_device else self._read(tensor, shape)
        self.device.synchronize()
        self._busy = False
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in outputs.items()}

    def allocate(self, names: Collection[str], what: str) -> dict[str, DeviceArray]:
        """Zeroed GPU memory for inputs that are updated in place, of their greatest shapes, in one piece.

        Raises:
            UserError: that much is not free; ``what`` says what it is for.
        """
        places, end = {}, 0
        for name in names:
            places[name] = end
            end += -(-self._size(name) // _ALIGNMENT) * _ALIGNMENT
        memory = self.device.malloc(end, what)
        self.device.clear(memory.pointer, end)
        self._given.append(memory)
        return {
            name: DeviceArray(memory, self.largest[name], self.tensors[name].dtype, offset)
            for name, offset in places.items()
        }

    @property
    def graphs(self) -> dict[str, str]:
        """For each set of shapes "captured", "not yet captured", or why there is no CUDA graph."""
        return self._contexts.graphs

    def close(self) -> None:
        """Free everything; outputs left on the device are gone, too, unless they were set aside."""
        self._contexts.close()
        for buffer in (*self._buffers.values(), *self._staging.values(), *self._given):
            buffer.free()
        self._engine = None

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inputs and outputs ------------------------------------------------------------------------------------------
    def _size(self, name: str) -> int:
        """Bytes of a tensor at its largest."""
        return int(np.prod(self.largest[name])) * self.tensors[name].dtype.itemsize

    def _settle(self) -> None:
        """Before a run: nothing of an interrupted one is under way, and outputs still in use are out of its way."""
        if self._busy:
            self.device.synchronize()
        for reference in self._loans.values():
            loan = reference()
            if loan is not None:
                loan.set_aside()
        self._loans.clear()

    def _stage(self, name: str) -> Buffer:
        """Pinned memory for a tensor, allocated when it is first fed from or read to the host."""
        if name not in self._staging:
            self._staging[name] = self.device.pinned(self._size(name), f"{self.where} (its {name}, on the host)")
        return self._staging[name]

    def _fill(self, tensor: Tensor, feed: Feed) -> None:
        """Bring an input to its buffer."""
        target, size, done = self._buffers[tensor.name], tensor.dtype.itemsize, 0
        for array in feed.arrays if isinstance(feed, Pieces) else [feed]:
            count = int(np.prod(array.shape))
            start = done * size
            if array.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {tensor.dtype}, not {array.dtype}")
            if isinstance(array, DeviceArray):
                self.device.copy(target.pointer + start, array.pointer, count * size)
            else:
                stage = target if tensor.on_host else self._stage(tensor.name)
                stage.array((done + count,), tensor.dtype)[done:] = array.ravel()
                if not tensor.on_host:
                    self.device.upload(target.pointer + start, stage.pointer + start, count * size)
            done += count

    def _lend(self, tensor: Tensor, shape: Shape) -> DeviceArray:
        loan = Loan(self.device, self._buffers[tensor.name], int(np.prod(shape)) * tensor.dtype.itemsize)
        self._loans[tensor.name] = weakref.ref(loan)
        return DeviceArray(loan, shape, tensor.dtype)

    def _read(self, tensor: Tensor, shape: Shape) -> np.ndarray:
        """Enqueue the copy of an output to pinned memory; valid once the stream is done, until the next run."""
        buffer = self._buffers[tensor.name]
        if tensor.on_host:
            return buffer.array(shape, tensor.dtype)
        stage = self._stage(tensor.name)
        self.device.fetch(stage.pointer, buffer.pointer, int(np.prod(shape)) * tensor.dtype.itemsize)
        return stage.array(shape, tensor.dtype)


def _exceeds(shape: Shape, most: Shape) -> bool:
    return any(size > limit for size, limit in zip(shape, most, strict=True))
