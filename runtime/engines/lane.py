"""One execution context of an engine, and the CUDA graph captured from it.

TensorRT's rules: after a change of shapes the next run does work that a graph must not hold, so a graph is captured
from the run after that one; and a graph is undefined once its context is changed. So a context whose graph is to last
keeps its shapes: ``EngineSession`` has one lane for each set of shapes that comes again, and one for all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from svdprune.runtime.engines.device import CudaError, Device
from svdprune.runtime.engines.handles import Graph
from svdprune.runtime.engines.tensors import Profile, Shape
from svdprune.runtime.errors import SvdpruneError

Fault = Callable[[str], SvdpruneError]
"""From what was attempted ("run") to the error that tells what TensorRT said about it."""


class EngineFault(SvdpruneError):
    """TensorRT refused or failed: its own words, explained where they are known."""


class Lane:
    """See the module.

    Args:
        context: an ``IExecutionContext`` with its memory.
        device: where it runs.
        profile: which optimisation profile it uses.
        repeats: whether its shapes come again, so that a graph pays.
        fault: makes the errors.

    Attributes:
        profile: as given.
        refused: why no graph could be captured; None while one can. The runs are the same without, only slower.
    """

    def __init__(self, context: Any, device: Device, profile: Profile, repeats: bool, fault: Fault) -> None:
        self.profile, self.refused = profile, None if repeats else "its shapes vary"
        self._context, self._device, self._fault = context, device, fault
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._graph: Graph | None = None
        self._warm = False
        if not context.set_optimization_profile_async(profile.index, device.stream):
            raise fault("take its optimisation profile")
        device.synchronize()  # the switch may copy on the stream

    @property
    def captured(self) -> bool:
        """Whether a graph is ready."""
        return self._graph is not None

    def prepare(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Set the shape of each input and the address of each input and output; what is unchanged costs nothing."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._forget_graph()
                if not self._context.set_input_shape(name, shape):
                    raise self._fault(f"take {name} of shape {list(shape)}")
                self._shapes[name] = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._forget_graph()
                if not self._context.set_tensor_address(name, address):
                    raise self._fault(f"take the address of {name}")
                self._addresses[name] = address

    def output_shape(self, name: str) -> Shape:
        """The shape of an output for the inputs' shapes."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self) -> None:
        """Enqueue one run: by the graph where there is one."""
        if self._graph is None and self._warm and self.refused is None:
            self._capture()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()
            self._warm = True

    def close(self) -> None:
        """Drop the graph and the context."""
        self._forget_graph()
        self._context = None

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise self._fault("run")

    def _capture(self) -> None:
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is not None and not capturable(self._device.stream):
            self.refused = "TensorRT says that its context cannot be captured"
            return
        try:
            self._graph = self._device.capture(self._enqueue)
        except (CudaError, EngineFault) as error:  # the plain run that follows tells whether more is wrong
            self.refused = str(error)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
        self._graph, self._warm = None, False
