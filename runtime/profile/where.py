"""What the figures of a profile are figures of: processor, threads, versions, and how busy the machine was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from svdprune.runtime.engines.adapter import RUNTIMES, find_tensorrt
from svdprune.runtime.engines.installation import TITLES
from svdprune.runtime.machine import local_gpu, power_mode
from svdprune.runtime.profile.report import Where
from svdprune.runtime.vlm import Vlm

CPU_INFO = Path("/proc/cpuinfo")
_PACKAGES = ("svdprune", "numpy", "onnxruntime", "onnxruntime-gpu", "polygraphy", "transformers", "torch")
_CPU_BACKENDS = {"onnxruntime", "transformers"}


def where(vision: str, decoder: str, threads: int | None, versions: dict[str, str]) -> Where:
    """Describe this machine.

    Args:
        vision, decoder: the backends; all but ONNX Runtime's CPU one and transformers run on a GPU.
        threads: as the caller asked.
        versions: of what is known already (TensorRT).
    """
    wanted = _PACKAGES if "transformers" in (vision, decoder) else _PACKAGES[:5]
    found = {"Python": platform.python_version()}
    for name in wanted:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # one of onnxruntime and onnxruntime-gpu is there
            continue
    on_cpu = {vision, decoder} <= _CPU_BACKENDS
    return Where(
        kind="CPU" if on_cpu else "GPU",
        processor=_processor() if on_cpu else _gpu(),
        cores=_cores(),
        threads=threads,
        load=_load(),
        versions={**found, **versions},
    )


def _gpu() -> str:
    """The GPU, with a Jetson's power mode, without which its figures say little."""
    gpu, mode = local_gpu(), power_mode()
    name = "a GPU that the driver does not name" if gpu is None else f"{gpu.name} (sm {gpu.sm})"
    return f"{name}, power mode {mode}" if mode else name


def backend_versions(vlm: Vlm) -> dict[str, str]:
    """Versions of the TensorRT that runs a part, by its title; the packages of the other backends are listed anyway."""
    names = dict.fromkeys(name for name in (vlm.vision.name, vlm.decoder.name) if name in RUNTIMES)
    return {TITLES[name]: find_tensorrt(name).version for name in names}


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware", "Model")))
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
