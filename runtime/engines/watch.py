"""Wait for a build that runs in a thread of its own: report how far it is, see what memory it takes, obey Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svdprune.runtime.engines.progress import Progress
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.machine import Gpu, host_memory

if TYPE_CHECKING:
    from svdprune.runtime.engines.device import Device

T = TypeVar("T")
Report = Callable[[str, float | None], None]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_NAME = "svdprune-build"
_TICK = 0.1  # seconds between two looks


class MemoryWatch:
    """The memory that a piece of work takes, by looking again and again.

    Args:
        gpu: the GPU that the work uses; None for none.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu, self._asked = gpu, 0.0
        self._device: Device | None = None
        with contextlib.suppress(OSError):  # where it cannot be, the mark is of the process's whole life
            _CLEAR.write_text("5", encoding="ascii")  # the kernel's own high-water mark starts anew
        self._before, self._peak = _resident("VmRSS"), 0
        memory = host_memory()
        self._free_before = self._free_least = memory.available if memory else None
        self._device_before = self._device_least = self._device_free()

    def look(self) -> None:
        """Take one look."""
        self._peak = max(self._peak, _resident("VmHWM"))
        memory = host_memory()
        if memory is not None and self._free_least is not None:
            self._free_least = min(self._free_least, memory.available)
        if time.monotonic() - self._asked > 1.0:
            free = self._device_free()
            if free is not None and self._device_least is not None:
                self._device_least = min(self._device_least, free)

    def result(self) -> dict[str, int | None]:
        """Bytes.

        ``process`` is the process's peak resident memory and ``added`` what the work added to it; ``device`` is by how
        much the GPU's free memory fell, ``machine`` by how much the machine's did on a device that shares one memory
        (other programs count there, too). None where it could not be seen.
        """
        self.look()
        if self._device is not None:
            self._device.close()
            self._device = None
        shared = self._gpu is not None and self._gpu.shared
        return {
            "process": self._peak or None,
            "added": max(0, self._peak - self._before) if self._peak else None,
            "device": _fall(self._device_before, self._device_least),
            "machine": _fall(self._free_before, self._free_least) if shared else None,
        }

    def _device_free(self) -> int | None:
        """Free memory of a discrete GPU; None without one, or without the CUDA binding."""
        self._asked = time.monotonic()
        if self._gpu is None or self._gpu.shared:
            return None
        try:
            from svdprune.runtime.engines.device import Device

            self._device = self._device or Device()
            free: int = self._device.memory()[0]
        except SvdpruneError:  # a look that fails must not end the build
            return None
        return free


def run_watched(work: Callable[[], T], progress: Progress, watch: MemoryWatch, report: Report, step: str) -> T:
    """Do ``work`` in a thread, so that this one can report and be interrupted while TensorRT computes.

    Args:
        progress: what the work fills in; Ctrl-C sets its ``cancelled`` and waits for the work to end. A second Ctrl-C
            does not wait.
        report: called with the step and its share of the whole.
        step: words for what is going on ("building the vision engine").

    Raises:
        KeyboardInterrupt: Ctrl-C; the work's result is dropped.
        Whatever the work raises.
    """
    outcome: dict[str, Any] = {}
    done = threading.Event()  # not Thread.join: when Ctrl-C meets that, Python takes the thread for ended

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:  # noqa: BLE001 - nothing is lost: the thread that waits raises it
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    try:
        report(step, None)
        thread.start()
        while not done.wait(_TICK):
            watch.look()
            report(step, progress.share or None)
    except KeyboardInterrupt:
        progress.cancelled = True
        report("stopping; Ctrl-C again does not wait for TensorRT", None)
        done.wait()
        thread.join()
        raise
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    value: T = outcome["value"]
    return value


def at_work() -> bool:
    """Whether a build that was not waited for still runs: Python cannot end properly then, TensorRT is in the way."""
    return any(thread.name == _NAME and thread.is_alive() for thread in threading.enumerate())


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    sizes = (int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
    return next(sizes, 0)


def _fall(before: int | None, least: int | None) -> int | None:
    return None if before is None or least is None else max(0, before - least)
