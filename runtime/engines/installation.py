"""What every use of an installed TensorRT shares: which one it is, its log, opening an engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from svdprune.runtime.engines.progress import BuildLog
from svdprune.runtime.errors import UserError

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
Sink = Callable[[str, str], None]


class Installation:
    """One installed TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        module: the imported module.
        version: its version string.
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module = name, module
        self.version = str(module.__version__)

    @property
    def title(self) -> str:
        """The name for a person, with the version."""
        return f"{TITLES[self.name]} {self.version}"

    @property
    def needs_gpu(self) -> bool:
        """Whether building needs the GPU that the engine is for; TensorRT-RTX names its targets instead."""
        return not hasattr(self.module, "ComputeCapability")

    @property
    def capabilities(self) -> tuple[int, ...]:
        """The compute capabilities (times ten) that an engine can be built for without its GPU; empty if none."""
        if self.needs_gpu:
            return ()
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.module.ComputeCapability))
        return tuple(sorted(int(match[1]) for match in names if match))

    @property
    def keeps_timings(self) -> bool:
        """Whether a timing cache saves time: TensorRT-RTX times nothing, its kernels are made where they run."""
        return self.needs_gpu

    @property
    def takes_decoder(self) -> bool:
        """Whether it has the layers of the decoder's graph: attention, and a KV cache updated in place."""
        definition = self.module.INetworkDefinition
        return hasattr(definition, "add_attention") and hasattr(definition, "add_kv_cache_update")

    def logger(self, sink: Sink) -> Any:
        """An ``ILogger`` that hands severity's name and message to ``sink``, which must not raise."""
        trt: Any = self.module

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                sink(str(getattr(severity, "name", severity)), msg)

        return Logger()

    def refusal(self, sm: int) -> str:
        """Why an engine for ``sm`` cannot be built here, and what to do."""
        known = ", ".join(map(str, self.capabilities))
        return (
            f"{self.title} builds for sm {known}, not for sm {sm}: build on the device itself with its own TensorRT "
            "(copy the bundle there and run `svdprune build`), or try the graph here against another GPU "
            "(`--target rtx-40`)"
        )

    def deserialize(self, data: Any, host_code: bool = False, log: BuildLog | None = None) -> Any:
        """An ``ICudaEngine`` from a serialised engine.

        Args:
            data: bytes, or any object with the buffer protocol.
            host_code: let a version-compatible engine run the code of its own TensorRT that it holds.

        Raises:
            UserError: there is no usable GPU, or the engine is of another GPU or TensorRT, truncated, or no engine.
        """
        trt: Any = self.module
        log = BuildLog() if log is None else log
        try:
            runtime = trt.Runtime(self.logger(log))
        except (TypeError, RuntimeError) as error:
            log("ERROR", str(error))
            raise UserError(log.fault(f"starting {self.title}")) from error
        if host_code and hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(log.fault(f"opening an engine with {self.title}"))
        return engine
