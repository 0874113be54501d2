"""The building half of ``fake_trt``: Builder, network, parser, configuration, profiles."""

from __future__ import annotations

from typing import Any

from fake_trt_common import NO_CUDA, NO_IMPORTER, NO_PROFILE, describe, new, serialise


class Builder:
    _trt: Any
    _state: Any

    def __init__(self, logger: Any) -> None:
        if self._state.sm is None and not self._state.rtx:
            logger.log(logger.WARNING, NO_CUDA)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        flags = int(flags)
        network = new(self._trt.INetworkDefinition)
        flag = self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network._typed = self._state.rtx or bool(flags >> int(flag) & 1)
        network._model = None
        self._state.calls.append(("create_network", flags))
        return network

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        state, log = self._state, self._logger
        state.calls.append(("build_serialized_network",))
        for severity, message in state.build_says:
            log.log(getattr(log, severity), message)
        if state.build_says and any(severity.endswith("ERROR") for severity, _ in state.build_says):
            return None
        dynamic = [item["name"] for item in network._io if item["mode"] == "INPUT" and -1 in item["shape"]]
        for profile in config._profiles or [{}]:
            missing = [name for name in dynamic if name not in profile]
            if missing:
                log.log(log.ERROR, NO_PROFILE)
                return None
        if not self._report(config.progress_monitor, network.num_layers):
            return None
        if state.rtx:
            log.log(log.INFO, "[MemUsageStats] Peak memory usage of TRT CPU/GPU memory allocators: CPU 3 MiB")
        log.log(log.INFO, "Total Activation Memory: 2048 bytes")
        capabilities = [int(c.name[2:]) for c in config._capabilities if c.name.startswith("SM")]
        flags = [flag.name for flag in config._flags]
        content = {
            "runtime": self._trt.__name__,
            "version": state.version,
            "sm": capabilities if state.rtx else [state.sm],
            "typed": network._typed,
            "io": network._io,
            "profiles": config._profiles,
            "layers": max(1, int(state.layers * network.num_layers)),
            "flags": flags,
            "level": config.builder_optimization_level,
            "workspace": config._pools.get("WORKSPACE"),
            "verbosity": config.profiling_verbosity.name,
        }
        if config._cache is not None:
            config._cache._content += b"one timing;"
        return self._trt.IHostMemory(serialise(content, network._model))

    def _report(self, monitor: Any, layers: int) -> bool:
        """Report the phases of a build; False when the monitor asks to stop."""
        if monitor is None:
            return True
        monitor.phase_start("Building engine", None, 2)
        for step, phase in enumerate(("Cloning network graph", "Timing kernels")):
            monitor.phase_start(phase, "Building engine", layers)
            for inner in range(layers):
                if self._state.on_step is not None:
                    self._state.on_step(phase, inner)
                if not monitor.step_complete(phase, inner):
                    return False
            monitor.phase_finish(phase)
            if not monitor.step_complete("Building engine", step):
                return False
        monitor.phase_finish("Building engine")
        return True


class INetworkDefinition:
    _trt: Any
    _typed: bool
    _io: list[dict[str, Any]]
    _nodes: int

    def get_flag(self, flag: Any) -> bool:
        return self._typed

    @property
    def num_layers(self) -> int:
        return self._nodes

    @property
    def num_inputs(self) -> int:
        return sum(item["mode"] == "INPUT" for item in self._io)

    @property
    def num_outputs(self) -> int:
        return sum(item["mode"] == "OUTPUT" for item in self._io)

    def get_input(self, index: int) -> Any:
        return self._tensor([item for item in self._io if item["mode"] == "INPUT"][index])

    def get_output(self, index: int) -> Any:
        return self._tensor([item for item in self._io if item["mode"] == "OUTPUT"][index])

    def _tensor(self, item: dict[str, Any]) -> Any:
        made = new(self._trt.ITensor)
        made.name, made.shape, made.dtype = item["name"], tuple(item["shape"]), self._trt.DataType[item["dtype"]]
        return made


class OnnxParser:
    _trt: Any
    _state: Any

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._errors = network, []
        self._logger = logger

    def parse_from_file(self, model: str) -> bool:
        import onnx
        from fake_trt import OPSETS

        loaded = onnx.load(str(model))
        ceiling, lacking = OPSETS[self._state.api]
        found = list(self._state.parse_says)
        opset = max((item.version for item in loaded.opset_import if not item.domain), default=1)
        for node in loaded.graph.node:
            if node.op_type in lacking:
                found.append((node.op_type, node.name, NO_IMPORTER.format(node.op_type)))
        if opset > ceiling:
            found.append(("", "", f"Your model uses opset {opset}, this parser supports up to {ceiling}"))
        for operator, name, words in found:
            error = new(self._trt.ParserError)
            error._content = (operator, name, words)
            self._errors.append(error)
            self._logger.log(self._logger.ERROR, words)
        if found:
            return False
        values = {item.name for item in loaded.graph.initializer}
        inputs = [value for value in loaded.graph.input if value.name not in values]
        self._network._io = [
            *(describe(value, "INPUT") for value in inputs),
            *(describe(value, "OUTPUT") for value in loaded.graph.output),
        ]
        self._network._nodes = len(loaded.graph.node)
        self._network._model = loaded.SerializeToString()
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class ParserError:
    _content: tuple[str, str, str]

    def node_operator(self) -> str:
        return self._content[0]

    def node_name(self) -> str:
        return self._content[1]

    def desc(self) -> str:
        return self._content[2]


class IBuilderConfig:
    _trt: Any
    _state: Any

    def __init__(self) -> None:
        self._flags = {self._trt.BuilderFlag.TF32}
        self._profiles: list[dict[str, Any]] = []
        self._pools: dict[str, int] = {}
        self._capabilities: list[Any] = []
        self._cache: Any = None
        self.progress_monitor = None
        self.builder_optimization_level = 3
        self.profiling_verbosity = self._trt.ProfilingVerbosity.LAYER_NAMES_ONLY

    def set_flag(self, flag: Any) -> None:
        self._state.calls.append(("set_flag", flag.name))
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._state.calls.append(("clear_flag", flag.name))
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._state.calls.append(("set_memory_pool_limit", pool.name, pool_size))
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool.name, 1 << 36)

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        made = new(self._trt.ITimingCache)
        made._content = bytes(serialized_timing_cache) or f"sm{self._state.sm};".encode()
        return made

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        fits = cache._content.startswith(f"sm{self._state.sm};".encode())
        if fits or ignore_mismatch:
            self._cache = cache
        return fits or ignore_mismatch

    def get_timing_cache(self) -> Any:
        return self._cache

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._capabilities = [self._trt.ComputeCapability.NONE] * count

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._capabilities[index] = compute_capability
        return True

    def get_compute_capability(self, index: int) -> Any:
        return self._capabilities[index]


class ITimingCache:
    _content: bytes

    def serialize(self) -> Any:
        return self._content


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> list[tuple[int, ...]]:  # noqa: A002
        return [tuple(shape) for shape in self._shapes[input]]


class ITensor:
    pass
