"""The execution contexts of one engine: a lane for each set of shapes that comes again, one a profile for the others.

They share the memory of their activations, as no two of them ever run at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.faults import explain
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.lane import EngineFault, Lane
from svdprune.runtime.engines.progress import BuildLog, first_line
from svdprune.runtime.engines.tensors import Profile, Shape, Tensor, choose_profile
from svdprune.runtime.errors import BundleError

_MOST_GRAPHS = 4  # sets of shapes that keep a context and a graph; each costs memory beside the shared one


class Contexts:
    """See the module.

    Args:
        trt: the library.
        engine: an ``ICudaEngine``.
        device: where it runs.
        tensors, profiles: the engine's.
        where: what to call the engine in messages.
        log: what the engine's TensorRT says.
    """

    def __init__(
        self,
        trt: Installation,
        engine: Any,
        device: Device,
        tensors: Mapping[str, Tensor],
        profiles: list[Profile],
        where: str,
        log: BuildLog,
    ) -> None:
        self._trt, self._engine, self._device, self._where, self._log = trt, engine, device, where, log
        self._tensors, self._profiles = tensors, profiles
        self._lanes: dict[tuple[str, object], Lane] = {}
        self._scratch = device.malloc(engine.device_memory_size_v2, f"{where} (its activations)")

    def find(self, shapes: Mapping[str, Shape], repeats: bool) -> Lane | None:
        """The lane for these shapes of all inputs, made when first needed; None where no profile takes them."""
        profile = choose_profile(self._profiles, shapes)
        if profile is None:
            return None
        free = tuple((name, shape) for name, shape in sorted(shapes.items()) if -1 in self._tensors[name].shape)
        key: tuple[str, object] = ("shapes", free)
        known = sum(kind == "shapes" for kind, _ in self._lanes)
        if (free and not repeats) or (key not in self._lanes and known >= _MOST_GRAPHS):
            key = ("profile", profile.index)
        if key not in self._lanes:
            self._lanes[key] = self._new_lane(profile, key[0] == "shapes")
        return self._lanes[key]

    def greatest(self, caps: Mapping[str, Shape]) -> dict[str, Shape]:
        """Greatest shape of every tensor when inputs are at most ``caps``, by TensorRT's own inference.

        Raises:
            BundleError: an output's shape is known only after a run.
        """
        found: dict[str, Shape] = {}
        for profile in sorted(self._profiles, key=lambda item: -item.room):
            most = {name: _least(shape, caps.get(name, shape)) for name, shape in profile.most.items()}
            if found and all(_least(shape, found[name]) == shape for name, shape in most.items()):
                continue  # within one that was asked
            lane = self.find(most, repeats=False)
            assert lane is not None  # a profile takes its own shapes
            lane.prepare(most, {})
            for name, tensor in self._tensors.items():
                shape = most[name] if tensor.is_input else lane.output_shape(name)
                if -1 in shape:
                    raise BundleError(f"{self._where} gives {name} a shape known only after a run: build it again")
                found[name] = tuple(map(max, shape, found.get(name, shape)))
        return found

    @property
    def graphs(self) -> dict[str, str]:
        """For each lane "captured", "not yet captured", or why it has no CUDA graph."""
        return {
            f"{kind} {what}": "captured" if lane.captured else lane.refused or "not yet captured"
            for (kind, what), lane in self._lanes.items()
        }

    def close(self) -> None:
        """Free the contexts and their memory."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._scratch.free()
        self._engine = None

    def _new_lane(self, profile: Profile, repeats: bool) -> Lane:
        lane = Lane(self._new_context(repeats), self._device, profile, repeats, self._fault)
        if repeats and any(tensor.on_host for tensor in self._tensors.values()):
            lane.refused = "the engine reads values on the host, which a graph would keep"
        return lane

    def _new_context(self, repeats: bool) -> Any:
        module, strategy = self._trt.module, self._trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
        specialise = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)  # of TensorRT-RTX
        if specialise is None:
            context = self._engine.create_execution_context(strategy)
        else:  # it compiles kernels on this machine, for each shape in the background unless told otherwise
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if repeats:  # a graph would keep the general kernels if it were captured before that is done
                config.dynamic_shapes_kernel_specialization_strategy = specialise.EAGER
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._fault("make an execution context")
        context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
        return context

    def _fault(self, attempt: str) -> EngineFault:
        said = "\n".join(self._log.errors)
        self._log.errors.clear()  # told: the next fault has its own
        reason = first_line(said) or "TensorRT gave no reason"
        return EngineFault(f"{self._where} cannot {attempt}: {explain(said) or f'{reason}; build it again'}")


def _least(shape: Shape, cap: Shape) -> Shape:
    return tuple(map(min, shape, cap))
