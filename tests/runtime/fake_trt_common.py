"""What the halves of ``fake_trt``'s behaviour share: loggers, a fake engine's form, and the library's own words."""

from __future__ import annotations

import enum
import hashlib
import json
from typing import Any

import numpy as np

MAGIC = b"ftrt"
CUDA_35 = (
    "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at "
    "/_src/common/dispatch/cudaResources.cpp:25 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)
NO_CUDA = (
    "CUDA initialization failure with error: 35. Please check your CUDA installation: "
    "http://docs.nvidia.com/cuda/cuda-installation-guide-linux/index.html"
)
NO_PROFILE = (
    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no "
    "optimization profile has been defined.)"
)
NO_IMPORTER = (
    "No importer registered for op: {}. Attempting to import as plugin. Plugin not found, are the plugin name, "
    "version, and namespace correct?"
)


class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = _Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = _Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: int, msg: str) -> None:
        raise AssertionError("log is for a derived class to write")


class Logger(ILogger):
    def __init__(self, min_severity: int = _Severity.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: int, msg: str) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise AssertionError("for a derived class to write")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise AssertionError("for a derived class to write")

    def phase_finish(self, phase_name: str) -> None:
        raise AssertionError("for a derived class to write")


class IProfiler:
    def __init__(self) -> None:
        pass

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise AssertionError("for a derived class to write")


def describe(value: Any, mode: str) -> dict[str, Any]:
    """An ONNX value as the fakes keep it; names of dynamic dimensions stay, to tell one from another."""
    from onnx import TensorProto

    kind = value.type.tensor_type
    names = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "DOUBLE": "FLOAT"}
    dtype = TensorProto.DataType.Name(kind.elem_type)
    dims = list(kind.shape.dim)
    return {
        "name": value.name,
        "mode": mode,
        "dtype": names.get(dtype, dtype),
        "shape": [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims],
        "symbols": ["" if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims],
    }


def serialise(content: dict[str, Any], model: bytes) -> bytes:
    """A fake engine: magic, length, header, ONNX model, checksum."""
    header = json.dumps(content).encode()
    body = MAGIC + len(header).to_bytes(4, "little") + len(model).to_bytes(8, "little") + header + model
    return body + hashlib.sha256(body).digest()


def engine_content(data: bytes) -> dict[str, Any]:
    """The header of a fake engine, for a test to look at."""
    size = int.from_bytes(data[4:8], "little")
    content: dict[str, Any] = json.loads(data[16 : 16 + size])
    return content


def nptype(dtype: Any) -> Any:
    """NumPy's type for a ``DataType``."""
    names = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
    return np.dtype(names.get(dtype.name, dtype.name.lower())).type


def volume(iterable: Any) -> int:
    """The product of the dimensions."""
    return int(np.prod(tuple(iterable)))


def new(kind: Any) -> Any:
    """An object of a class that has no public constructor."""
    return object.__new__(kind)
