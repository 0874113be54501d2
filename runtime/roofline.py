"""A roofline model: how long a piece of work should take on a machine, from its FLOPs, its bytes and the peaks.

Work is a list of groups of operations. A group takes as long as the slowest of three things: its arithmetic at the
share of the peak that kernels reach, its bytes at the share of the bandwidth that they reach, and its kernels one after
the other at what the shortest kernel takes. Groups follow one another, so a stage takes their sum. Nothing here is
measured and nothing knows a model: sizes come from the caller.

FLOPs are those of matrix products and convolutions, two for each multiply-add, as torch's counter has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import PRECISIONS, Target

NOT_MEASURED = "a roofline model, not a measurement"

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Efficiency:
    """The shares of the peaks that real kernels reach, one set for every model and machine (docs/estimate.md).

    compute: of the arithmetic peak, for the matrix products of transformers at batch 1.
    bandwidth: of the memory bandwidth, for a decoder's weights read row by row.
    kernel: seconds that a kernel takes at least when it waits for the one before.
    """

    compute: float = 0.5
    bandwidth: float = 0.75
    kernel: float = 4e-6

    def __post_init__(self) -> None:
        if not (0.0 < self.compute <= 1.0 and 0.0 < self.bandwidth <= 1.0 and self.kernel >= 0.0):
            raise UserError("an efficiency is a share of a peak, above 0 and up to 1, and a kernel's time is 0 or more")


DEFAULT = Efficiency()


@dataclass(frozen=True)
class _Cores:
    """Dense FLOP a clock and multiprocessor: FP16 on tensor cores, that by warp-level instructions, FP32 without."""

    tensor: int
    warp: int
    fp32: int


# By compute capability. From Hopper on the tensor cores' full rate belongs to instructions of whole warp groups (wgmma,
# tcgen05), which take their operands from shared memory. Kernels that unpack 4-bit weights in registers issue the older
# mma.sync of a single warp: about five eighths of the rate on Hopper, and Ampere's rate on a Blackwell with tcgen05.
_CORES = {
    80: _Cores(2048, 2048, 128),
    86: _Cores(512, 512, 256),
    87: _Cores(2048, 2048, 256),
    89: _Cores(512, 512, 256),
    90: _Cores(4096, 2560, 256),
    110: _Cores(8192, 2048, 256),
    120: _Cores(512, 512, 256),
}
_IN_REGISTERS = "int4"  # weights only: unpacked to FP16 in registers, computed in FP16


@dataclass(frozen=True)
class Machine:
    """What a roofline needs of a target.

    Attributes:
        name: the target's.
        peaks: (precision, FLOP or integer operations a second) for each precision whose peak is known.
        bandwidth: bytes a second.
        memory: bytes, None where not known; `shared` when the CPU and its system live there too.
    """

    name: str
    peaks: tuple[tuple[str, float], ...]
    bandwidth: float
    memory: int | None
    shared: bool

    def peak(self, precision: str) -> float:
        """Operations a second at `precision`.

        Raises:
            UserError: not a precision, or its peak on this target is not known.
        """
        known = dict(self.peaks)
        if precision in known:
            return known[precision]
        raise UserError(
            f"the peak of {self.name} in {precision} is not known: choose {', '.join(known)}, or give --tflops"
            if precision in PRECISIONS
            else f"unknown precision '{precision}': it must be one of {', '.join(PRECISIONS)}"
        )


def machine(target: Target, tflops: float | None = None, bandwidth: float | None = None) -> Machine:
    """The machine of a row of the target table.

    Args:
        tflops: dense FP16 peak instead of the row's, for another power mode or module; the other precisions keep their
            ratio to it. For a target without a peak (the CPU) it is the peak of every precision it runs.
        bandwidth: GB/s instead of the row's.

    Raises:
        UserError: the row has no peak or no bandwidth and none was given, or a figure that is not above 0.
    """
    for name, value in (("--tflops", tflops), ("--bandwidth", bandwidth)):
        if value is not None and not 0.0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, not {value}")
    fp16 = tflops if tflops is not None else target.fp16_tflops
    gbs = bandwidth if bandwidth is not None else target.bandwidth_gbs
    if fp16 is None or gbs is None:
        missing = [name for name, value in (("--tflops", fp16), ("--bandwidth", gbs)) if value is None]
        lacking = f"there are no peaks for {target.name} ({target.device})"
        raise UserError(f"{lacking}, which a roofline needs: give {' and '.join(missing)}")
    memory = None if target.memory_gb is None else round(target.memory_gb * GIGA)
    return Machine(target.name, _peaks(target, fp16 * TERA), gbs * GIGA, memory, bool(target.memory_shared))


def _peaks(target: Target, fp16: float) -> tuple[tuple[str, float], ...]:
    if target.sm is None or target.fp16_tflops is None:
        return tuple((precision, fp16) for precision in target.precisions)
    if target.sm not in _CORES:
        raise UserError(f"the rates of sm {target.sm} ({target.name}) are not known to the roofline model")
    cores, clocks = _CORES[target.sm], fp16 / (target.fp16_tflops * TERA)
    peaks: dict[str, float] = {
        "fp32": fp16 * cores.fp32 / cores.tensor,
        "fp16": fp16,
        "bf16": fp16,
        _IN_REGISTERS: fp16 * cores.warp / cores.tensor,
    }
    rows = (("int8", target.int8_tops), ("fp8", target.fp8_tflops), ("fp4", target.fp4_tflops))
    peaks |= {name: figure * TERA * clocks for name, figure in rows if figure is not None}
    return tuple((name, peaks[name]) for name in target.precisions if name in peaks)


@dataclass(frozen=True)
class Work:
    """A group of operations that run at one precision.

    Attributes:
        name: what it is.
        flops: of its matrix products.
        weights: bytes of weights, read once.
        moved: bytes of activations read and written.
        cache: bytes of the KV cache read and written.
        precision: that its arithmetic runs at.
        kernels: how many kernels follow one another.
    """

    name: str
    flops: float = 0.0
    weights: float = 0.0
    moved: float = 0.0
    cache: float = 0.0
    precision: str = "fp16"
    kernels: int = 1

    @property
    def bytes(self) -> float:
        """All its bytes."""
        return self.weights + self.moved + self.cache

    def times(self, count: int) -> Work:
        """`count` of this one after the other, each with weights of its own."""
        return replace(
            self,
            flops=self.flops * count,
            weights=self.weights * count,
            moved=self.moved * count,
            cache=self.cache * count,
            kernels=self.kernels * count,
        )


@dataclass(frozen=True)
class Time:
    """Seconds that each of the three limits would take alone, and what bounds the work."""

    compute: float
    memory: float
    kernels: float

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.compute, self.memory, self.kernels)

    @property
    def bound(self) -> str:
        """Which one that is: "compute", "memory" or "kernels"."""
        return max(("compute", "memory", "kernels"), key=lambda limit: getattr(self, limit))


def time_of(work: Work, on: Machine, efficiency: Efficiency = DEFAULT) -> Time:
    """The roofline of one group."""
    compute = work.flops / (on.peak(work.precision) * efficiency.compute) if work.flops else 0.0
    return Time(compute, work.bytes / (on.bandwidth * efficiency.bandwidth), work.kernels * efficiency.kernel)


@dataclass(frozen=True)
class StageTime:
    """A stage on a machine: its work, its seconds, and the seconds of it that each limit governs."""

    flops: float
    bytes: float
    kernels: int
    seconds: float
    bound: str
    compute_bound: float
    memory_bound: float
    kernel_bound: float


def stage_time(works: Iterable[Work], on: Machine, efficiency: Efficiency = DEFAULT) -> StageTime:
    """Groups one after the other. `bound` is the limit that governs most of the time; "none" for no work at all."""
    works = list(works)
    governed = {"compute": 0.0, "memory": 0.0, "kernels": 0.0}
    for work in works:
        time = time_of(work, on, efficiency)
        governed[time.bound] += time.seconds
    return StageTime(
        flops=sum(work.flops for work in works),
        bytes=sum(work.bytes for work in works),
        kernels=sum(work.kernels for work in works),
        seconds=sum(governed.values()),
        bound=max(governed, key=lambda limit: governed[limit]) if works else "none",
        compute_bound=governed["compute"],
        memory_bound=governed["memory"],
        kernel_bound=governed["kernels"],
    )
