"""What each deployment target is: one row of data a target, and the questions asked of the rows.

The figures are the vendor's dense peaks (no sparsity), rounded to whole TFLOPS and TOPS; a figure that is not known is
None, never a guess. Tensor-core figures of GeForce cards are those with float32 accumulation, which TensorRT uses for
fp16 and fp8. What TensorRT's parser takes hangs on the release, not on the board, so a target lists the releases it
can run, and ``runtime.traps`` the rules of each. ``docs/targets.md`` shows all of it, with sources.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from svdprune.runtime.errors import UserError
from svdprune.runtime.traps import Version, parse_version, traps_of

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")  # int4: weights only
TENSORRT_RTX_SMS = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX 1.7 builds for


@dataclass(frozen=True)
class Release:
    """A set of software that a target runs.

    Attributes:
        name: "JetPack 6.2", "TensorRT 11.4".
        tensorrt: TensorRT's version ("10.3").
        cuda, python: versions; None where the release does not fix one or it is not known.
        opset: highest ONNX opset that is safe to hand to its parser.
    """

    name: str
    tensorrt: str
    cuda: str | None
    python: str | None
    opset: int

    @property
    def title(self) -> str:
        """TensorRT's version with the release that it comes in: "TensorRT 10.3 (JetPack 6.2)"."""
        own = f"TensorRT {self.tensorrt}"
        return own if self.name == own else f"{own} ({self.name})"

    @property
    def traps(self) -> tuple[str, ...]:
        """What its parser does not take, a sentence each."""
        return tuple(f"{trap.sentence[:-1]}: {trap.remedy}." for trap in traps_of(self.tensorrt))


@dataclass(frozen=True)
class Target:
    """One deployment target.

    Attributes:
        name: what ``--target`` takes.
        device: the device that the figures belong to.
        sm: CUDA compute capability times ten (87 is 8.7); None for a target without a CUDA GPU.
        memory_gb: memory in GB; ``memory_shared`` when CPU and GPU share it.
        bandwidth_gbs: memory bandwidth, GB/s.
        fp16_tflops, int8_tops, fp8_tflops, fp4_tflops: dense peaks of the device; None where not known or not present.
        precisions: of ``PRECISIONS``, those a bundle for this target may use.
        releases: software the target runs, oldest first; empty where there is no TensorRT.
        note: what else to know, or "".
        source: where the figures come from.
    """

    name: str
    device: str
    sm: int | None
    memory_gb: int | None
    memory_shared: bool | None
    bandwidth_gbs: int | None
    fp16_tflops: int | None
    int8_tops: int | None
    fp8_tflops: int | None
    fp4_tflops: int | None
    precisions: tuple[str, ...]
    releases: tuple[Release, ...]
    note: str = ""
    source: str = ""

    @property
    def tensorrt_rtx(self) -> bool:
        """Whether TensorRT-RTX builds engines for it, which needs no GPU."""
        return self.sm in TENSORRT_RTX_SMS

    @property
    def opset_ceiling(self) -> int | None:
        """The opset that every release of the target takes; None where TensorRT sets no limit."""
        return min((release.opset for release in self.releases), default=None)

    @property
    def traps(self) -> tuple[str, ...]:
        """The traps of all its releases, each once, in order."""
        return tuple(dict.fromkeys(trap for release in self.releases for trap in release.traps))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values, with ``opset_ceiling``, ``tensorrt_rtx`` and each release's ``traps``."""
        releases = [{**dataclasses.asdict(release), "traps": list(release.traps)} for release in self.releases]
        more = {"releases": releases, "opset_ceiling": self.opset_ceiling, "tensorrt_rtx": self.tensorrt_rtx}
        return {**dataclasses.asdict(self), **more}


JETPACK_6_2 = Release("JetPack 6.2", "10.3", "12.6", "3.10", 20)
# No published ceiling of 10.13 is at hand; a later minor version takes at least what 10.3 takes.
JETPACK_7_1 = Release("JetPack 7.1", "10.13", "13.0", "3.12", 20)
JETPACK_7_2 = Release("JetPack 7.2", "10.16", "13.2", "3.12", 24)
JETPACK_7_2_2 = Release("JetPack 7.2.2", "11.4", None, "3.12", 25)
TENSORRT_10_16 = Release("TensorRT 10.16", "10.16", None, None, 24)
TENSORRT_11_4 = Release("TensorRT 11.4", "11.4", None, None, 25)
RELEASES = (JETPACK_6_2, JETPACK_7_1, JETPACK_7_2, JETPACK_7_2_2, TENSORRT_10_16, TENSORRT_11_4)

_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "fp4")
_ORIN = (JETPACK_6_2, JETPACK_7_2)
_DESKTOP = (TENSORRT_10_16, TENSORRT_11_4)

# fmt: off
_ROWS = (
    #      name, device                              sm    GB    shared GB/s  fp16  int8  fp8   fp4
    Target("cpu", "any CPU",                         None, None, None,  None, None, None, None, None,
           ("fp32", "fp16", "int8", "int4"), (),
           "Runs by ONNX Runtime; fp16 saves space, not time: it is computed in fp32."),
    Target("jetson-orin-nano", "Jetson Orin Nano 8GB", 87,    8, True,   102,   17,   33, None, None,
           _AMPERE, _ORIN, "Figures of the Super power mode.", "Jetson Orin Nano series data sheet"),
    Target("jetson-orin-nx", "Jetson Orin NX 16GB",    87,   16, True,   102,   15,   30, None, None,
           _AMPERE, _ORIN, "The GPU alone, without the DLAs.", "Jetson Orin NX series data sheet"),
    Target("jetson-orin", "Jetson AGX Orin 64GB",      87,   64, True,   205,   42,   85, None, None,
           _AMPERE, (*_ORIN, JETPACK_7_2_2),
           "The GPU alone, without the DLAs. The 32GB module: 27 TFLOPS fp16, 54 TOPS int8.",
           "Jetson AGX Orin series data sheet"),
    Target("jetson-thor", "Jetson T5000",             110,  128, True,   273,  258,  517,  517, 1035,
           _BLACKWELL, (JETPACK_7_1, JETPACK_7_2, JETPACK_7_2_2), "", "Jetson Thor series modules data sheet"),
    Target("rtx-30", "GeForce RTX 3090",               86,   24, False,  936,   71,  284, None, None,
           _AMPERE, _DESKTOP, "", "NVIDIA Ampere GA102 whitepaper"),
    Target("rtx-40", "GeForce RTX 4090",               89,   24, False, 1008,  165,  660,  330, None,
           _ADA, _DESKTOP, "", "NVIDIA Ada architecture whitepaper"),
    Target("rtx-50", "GeForce RTX 5090",              120,   32, False, 1792,  209,  838,  419, 1676,
           _BLACKWELL, _DESKTOP, "", "NVIDIA RTX Blackwell architecture whitepaper"),
    Target("a100", "A100 80GB",                        80,   80, False, 2039,  312,  624, None, None,
           _AMPERE, _DESKTOP, "", "A100 data sheet"),
    Target("h100", "H100 SXM",                         90,   80, False, 3350,  989, 1979, 1979, None,
           _ADA, _DESKTOP, "", "H100 data sheet"),
)
# fmt: on
TARGETS: dict[str, Target] = {row.name: row for row in _ROWS}

# Compute capability at which a precision appears in the tensor cores, and the words for it.
_NEEDS = {
    "fp8": (89, "FP8 tensor cores appear with sm 89"),
    "fp4": (100, "FP4 tensor cores appear with Blackwell, sm 100"),
}


def target_names() -> tuple[str, ...]:
    """All names that ``--target`` takes, ``auto`` last."""
    return (*TARGETS, AUTO)


def find_target(name: str) -> Target:
    """The row called ``name``.

    Raises:
        UserError: no such target (near misses are named, then all), or ``auto``, which is for ``detect_target``.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name == AUTO:
        raise UserError("auto stands for this machine and is not a target of its own: name one, or detect it first")
    near = difflib.get_close_matches(name.lower(), target_names(), n=3, cutoff=0.5)
    meant = f" did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"unknown target '{name}':{meant} the targets are {', '.join(target_names())}")


def opset_limit(version: Version) -> int:
    """Highest opset that is safe for a TensorRT release, also for one between those of the table."""
    return max(release.opset for release in RELEASES if parse_version(release.tensorrt) <= version)


def check_precision(target: Target, precision: str) -> None:
    """Refuse a precision that the target cannot run.

    Raises:
        UserError: not a precision at all, or not one of the target's; the sentence gives the reason and those it has.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}': it must be one of {', '.join(PRECISIONS)}")
    if precision in target.precisions:
        return
    reason = target.device
    if precision in _NEEDS and target.sm is not None and target.sm < _NEEDS[precision][0]:
        reason = f"{_NEEDS[precision][1]} and the {target.device} is sm {target.sm}"
    raise UserError(f"{target.name} cannot run {precision} ({reason}): use one of {', '.join(target.precisions)}")
