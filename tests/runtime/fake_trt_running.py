"""The running half of ``fake_trt``: Runtime, ICudaEngine, IExecutionContext, EngineInspector."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import fake_trt_common as common
import numpy as np


class Runtime:
    _trt: Any
    _state: Any

    def __init__(self, logger: Any) -> None:
        if self._state.sm is None and not self._state.rtx:
            logger.log(logger.WARNING, common.NO_CUDA)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        data, log = bytes(serialized_engine), self._logger
        said = self._refusal(data)
        if said:
            log.log(log.ERROR, said)
            return None
        size, content = int.from_bytes(data[4:8], "little"), common.engine_content(data)
        engine = object.__new__(self._trt.ICudaEngine)
        engine._content, engine._model, engine._data = content, data[16 + size : -32], data
        return engine

    def _refusal(self, data: bytes) -> str:
        """Why the engine cannot be read, in the library's words; "" when it can."""
        state = self._state
        wrong = "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
        if data[:4] != common.MAGIC:
            return wrong + "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            return (
                wrong + "sizeRead == static_cast<uint64_t>(mEnd - mCurrent) failed.Size specified in header does not "
                "match archive size)"
            )
        content = common.engine_content(data)
        compatible = "VERSION_COMPATIBLE" in content["flags"] and self.engine_host_code_allowed
        same_major = content["version"].split(".")[0] == state.version.split(".")[0]
        if content["runtime"] != self._trt.__name__:
            return wrong + "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
        if content["version"] != state.version and not (compatible and same_major):
            return (
                "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not "
                f"compatible with this version of TensorRT, expecting library version {state.version} "
                f"got {content['version']}, please rebuild.)"
            )
        if state.sm is None:
            return common.CUDA_35
        if content["sm"] and state.sm not in content["sm"]:
            here, there = (f"{sm // 10}.{sm % 10}" for sm in (state.sm, content["sm"][0]))
            return (
                "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on "
                f"an incompatible device, expecting compute {here} got compute {there}, please rebuild.)"
            )
        return ""

    def get_engine_validity(self, buffer: bytes) -> Any:
        valid = self._trt.EngineValidity
        return (valid.INVALID if self._refusal(bytes(buffer)) else valid.VALID, 0)


class ICudaEngine:
    _trt: Any
    _state: Any
    _content: dict[str, Any]
    _model: bytes
    _data: bytes

    @property
    def name(self) -> str:
        return "fake engine"

    @property
    def num_io_tensors(self) -> int:
        return len(self._content["io"])

    @property
    def num_layers(self) -> int:
        return int(self._content["layers"])

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._content["profiles"]))

    @property
    def device_memory_size_v2(self) -> int:
        return 2048

    @property
    def device_memory_size(self) -> int:
        return 2048

    @property
    def refittable(self) -> bool:
        return False

    @property
    def profiling_verbosity(self) -> Any:
        return self._trt.ProfilingVerbosity[self._content["verbosity"]]

    def _item(self, name: str) -> dict[str, Any]:
        return next(item for item in self._content["io"] if item["name"] == name)

    def get_tensor_name(self, index: int) -> str:
        return str(self._content["io"][index]["name"])

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode[self._item(name)["mode"]]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType[self._item(name)["dtype"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._item(name)["shape"])

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        profiles = self._content["profiles"]
        shapes = profiles[profile_index].get(name) if profiles else None
        return [tuple(shape) for shape in shapes or [self._item(name)["shape"]] * 3]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """A ``present.*`` output is its ``past.*`` input's, where the graph updates a cache in place."""
        past = name.replace("present.", "past.", 1)
        updates = b"TensorScatter" in self._model
        return past if updates and name.startswith("present.") else None

    def create_runtime_config(self) -> Any:
        config = object.__new__(self._trt.IRuntimeConfig)
        config._strategy = self._trt.ExecutionContextAllocationStrategy.STATIC
        return config

    def create_execution_context(self, strategy: Any = None) -> Any:
        """``strategy`` may be a runtime configuration where the API has them."""
        chosen = getattr(strategy, "_strategy", strategy)
        context = object.__new__(self._trt.IExecutionContext)
        context._engine, context._shapes, context._addresses, context._profile = self, {}, {}, 0
        context._own_memory = chosen is None or chosen.name != "USER_MANAGED"
        context._changes, context._settled = 0, False
        context.profiler = None
        self._state.calls.append(("create_execution_context", chosen and chosen.name, strategy))
        return context

    def create_engine_inspector(self) -> Any:
        inspector = object.__new__(self._trt.EngineInspector)
        inspector._engine = self
        return inspector

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._data)


class IRuntimeConfig:
    _strategy: Any

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class IExecutionContext:
    _trt: Any
    _state: Any
    _engine: Any
    _shapes: dict[str, tuple[int, ...]]
    _addresses: dict[str, int]
    _profile: int
    _own_memory: bool
    _changes: int
    _settled: bool
    profiler: Any

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return False
        self._profile, self._shapes = profile_index, {}
        self._changes, self._settled = self._changes + 1, False
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._engine.device_memory_size_v2:
            raise RuntimeError("the memory is too small")  # the real one logs an error
        self._own_memory = bool(memory)
        self._changes += 1

    def set_input_shape(self, name: str, shape: Any) -> bool:
        shape = tuple(int(size) for size in shape)
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        static = self._engine.get_tensor_shape(name)
        fits = len(shape) == len(static) and all(
            low <= size <= high if fixed == -1 else size == fixed
            for size, fixed, low, high in zip(shape, static, least, most, strict=True)
        )
        if fits:
            self._shapes[name] = shape
            self._changes, self._settled = self._changes + 1, False
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for item in self._engine._content["io"]:
            if item["mode"] == "INPUT":
                shape = self._shapes.get(item["name"], item["shape"])
                sizes |= {symbol: size for symbol, size in zip(item["symbols"], shape, strict=True) if symbol}
        item = self._engine._item(name)
        pairs = zip(item["shape"], item["symbols"], strict=True)
        return tuple(sizes.get(symbol, -1) if size == -1 else size for size, symbol in pairs)

    def infer_shapes(self) -> list[str]:
        items = self._engine._content["io"]
        return [item["name"] for item in items if item["mode"] == "INPUT" and -1 in self.get_tensor_shape(item["name"])]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        known = any(item["name"] == name for item in self._engine._content["io"])
        if known:
            self._addresses[name] = int(memory)
            self._changes += 1
        return known

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        from fake_trt import Execution

        self._state.calls.append(("execute_async_v3", stream_handle))
        if not self._own_memory:
            return False
        parts: dict[str, dict[str, Any]] = {"INPUT": {}, "OUTPUT": {}}
        for item in self._engine._content["io"]:
            name, shape = item["name"], self.get_tensor_shape(item["name"])
            if -1 in shape or not self._addresses.get(name):
                return False  # the real one logs an error and gives False
            dtype = np.dtype(common.nptype(self._trt.DataType[item["dtype"]]))
            parts[item["mode"]][name] = (self._addresses[name], shape, dtype)
        done = self._state.execute(
            Execution(self._engine._model, parts["INPUT"], parts["OUTPUT"], int(stream_handle), self._profile, self)
        )
        if self.profiler is not None:
            for index in range(self._engine.num_layers):
                self.profiler.report_layer_time(f"layer {index}", 0.25)
        return bool(done)


class EngineInspector:
    _trt: Any
    _engine: Any

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        layers = [{"Name": f"layer {index}", "LayerType": "kgen"} for index in range(self._engine.num_layers)]
        return json.dumps({"Layers": layers, "Bindings": [item["name"] for item in self._engine._content["io"]]})

    def get_layer_information(self, layer_index: int, format: Any) -> str:  # noqa: A002
        return json.dumps({"Name": f"layer {layer_index}", "LayerType": "kgen"})
