"""Which target this machine is: what ``--target auto`` stands for."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.targets import AUTO, TARGETS, Target, find_target

DEVICE_TREE = Path("/proc/device-tree/model")  # a Jetson's own name; absent elsewhere
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
    try:
        model = DEVICE_TREE.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:  # not a device-tree machine
        model = ""
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
