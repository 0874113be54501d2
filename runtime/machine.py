"""Which target this machine is: what ``--target auto`` stands for; and its GPU, its memory, its power mode."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.targets import AUTO, TARGETS, Target, find_target

DEVICE_TREE = Path("/proc/device-tree/model")  # a Jetson's own name; absent elsewhere
MEMINFO = Path("/proc/meminfo")
POWER_STATUS = Path("/var/lib/nvpmodel/status")  # where a Jetson's nvpmodel keeps the mode it set
_POWER = ("nvpmodel", "-q")
_JETSONS = (  # first match wins: "Orin Nano" before "Orin"
    ("orin nano", "jetson-orin-nano"),
    ("orin nx", "jetson-orin-nx"),
    ("orin", "jetson-orin"),
    ("thor", "jetson-thor"),
)
_QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
_NO_GPU = ("No devices were found", "couldn't communicate with the NVIDIA driver")  # tools without a usable GPU
_QUERY_SECONDS = 20  # a driver that does not answer within this is not going to


@dataclass(frozen=True)
class Detection:
    """The target that fits this machine, and what was found, as words for a person."""

    target: Target
    found: str


def resolve_target(name: str) -> Detection:
    """The row for ``name``; for ``auto``, the row of this machine.

    Raises:
        UserError: an unknown name, or ``auto`` on an NVIDIA GPU that no row describes.
        SvdpruneError: a driver that is there and does not answer.
    """
    if name == AUTO:
        return detect_target()
    return Detection(find_target(name), f"{name}, as asked")


def detect_target() -> Detection:
    """Look for a Jetson, then for an NVIDIA GPU; with neither, this machine is ``cpu``."""
    model = _device_tree()
    if "jetson" in model.lower():
        return _jetson(model)
    gpus = _nvidia_gpus()
    if not gpus:
        return Detection(TARGETS["cpu"], "no NVIDIA GPU is visible")
    name, sm = gpus[0]
    rows = [row for row in TARGETS.values() if row.sm == sm and not row.memory_shared]
    if not rows:
        raise UserError(f"auto found {name} (sm {sm}), for which there is no target: name one, or cpu")
    return Detection(rows[0], f"found {name} (sm {sm})")


def _device_tree() -> str:
    """The machine's own name; "" where it has none."""
    try:
        return DEVICE_TREE.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:  # not a device-tree machine
        return ""


def _jetson(model: str) -> Detection:
    for words, name in _JETSONS:
        if words in model.lower():
            return Detection(TARGETS[name], f"found {model}")
    raise UserError(f"auto found {model}, for which there is no target: name one, or cpu")


def _nvidia_gpus() -> list[tuple[str, int]]:
    """Name and compute capability (times ten) of each GPU that the driver shows; empty without a driver or a GPU."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except FileNotFoundError:
        return []  # no driver
    except subprocess.CalledProcessError as error:
        said = (error.stderr + error.stdout).strip()
        if any(words in said for words in _NO_GPU):
            return []
        raise SvdpruneError(f"nvidia-smi failed ({said}): name the target instead of auto") from error
    except subprocess.TimeoutExpired as error:
        said = f"nvidia-smi gave no answer in {_QUERY_SECONDS} s"
        raise SvdpruneError(f"{said}: name the target instead of auto") from error
    gpus = []
    for line in answer.stdout.splitlines():
        name, _, capability = line.rpartition(",")
        try:
            gpus.append((name.strip(), round(float(capability) * 10)))
        except ValueError as error:
            raise SvdpruneError(f"nvidia-smi answered '{line}', which was not understood: name the target") from error
    return gpus


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine that CUDA would use first.

    Attributes:
        name: "NVIDIA GeForce RTX 4090".
        sm: compute capability times ten.
        shared: whether its memory is the CPU's (Jetson).
        total, free: its memory in bytes; None where the driver does not say.
    """

    name: str
    sm: int
    shared: bool
    total: int | None
    free: int | None


@dataclass(frozen=True)
class HostMemory:
    """The CPU's memory in bytes: all of it, what programs can still get, and the free swap."""

    total: int
    available: int
    swap: int


def local_gpu() -> Gpu | None:
    """The GPU here; None without one.

    Raises:
        UserError: a Jetson that no target describes.
        SvdpruneError: a driver that is there and does not answer.
    """
    model = _device_tree()
    if "jetson" in model.lower():
        sm = _jetson(model).target.sm
        assert sm is not None
        memory = host_memory()
        total, free = (None, None) if memory is None else (memory.total, memory.available)
        return Gpu(model, sm, True, total, free)
    gpus = _nvidia_gpus()
    if not gpus:
        return None
    name, sm = gpus[0]
    total, free = _gpu_memory()
    return Gpu(name, sm, False, total, free)


def host_memory() -> HostMemory | None:
    """What /proc/meminfo says; None on a system without one."""
    try:
        lines = MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    if not {"MemTotal", "MemAvailable"} <= set(kib):
        return None
    return HostMemory(kib["MemTotal"] << 10, kib["MemAvailable"] << 10, kib.get("SwapFree", 0) << 10)


def power_mode() -> str | None:
    """A Jetson's power mode as its own tool names it ("MAXN"), or by number; None where it cannot be read."""
    try:
        answer = subprocess.run(_POWER, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        answer = ""
    for line in answer.splitlines():
        name, _, mode = line.partition("NV Power Mode:")
        if not name.strip() and mode.strip():
            return mode.strip()
    try:
        status = POWER_STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"pmode:(\d+)", status)
    return f"number {int(found[1])}" if found else None


def _gpu_memory() -> tuple[int | None, int | None]:
    """All and free memory of the first GPU in bytes; None where the driver shows none."""
    query = (_QUERY[0], "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True).stdout
        total, _, free = answer.splitlines()[0].partition(",")
        return int(total) << 20, int(free) << 20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):  # "[N/A]" on some devices
        return None, None
