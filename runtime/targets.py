"""What each deployment target is: one row of data a target, and the questions asked of the rows.

The figures are the vendor's dense peaks (no sparsity), rounded to whole TFLOPS and TOPS; a figure that is not known is
None, never a guess. TensorRT's rules hang on the release, not on the board, so a target lists the releases it can run.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from svdprune.runtime.errors import UserError

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")  # int4: weights only

_EVERY_TENSORRT = (
    "QR, SVD, Inverse, Cholesky and Det are refused: the factorisation must be written in matrix products.",
    "Compress, Unique and Scatter with reduction=add are refused: select by TopK and Gather.",
    "TopK needs a constant K of at most 3840.",
    "Resize with antialias is refused: resize the picture before the graph.",
    "DynamicQuantizeLinear, MatMulInteger and QLinear* are refused: quantise with symmetric int8 Q/DQ pairs.",
    "Double becomes float without a word: export float32.",
)
_TENSORRT_10_3 = (
    "ScatterND follows its meaning before opset 18 (until 10.9): export at opset 17 where a graph uses it.",
    "Einsum takes no ellipsis and no diagonal (until 10.12): write MatMul and Transpose.",
    "Pow of integers is refused (until 10.12): cast to float first.",
    "TopK needs sorted=1.",
    "Axes of a Reduce must be an initialiser.",
    "There is no Attention (from 10.14), RotaryEmbedding or RMSNormalization (from 10.15) layer.",
)


@dataclass(frozen=True)
class Release:
    """A set of software that a target runs.

    Attributes:
        name: "JetPack 6.2", "TensorRT 11.4".
        tensorrt, cuda, python: version strings; None where the release does not fix one or it is not known.
        opset: highest ONNX opset that is safe to hand to its parser; None where not known.
        traps: operators of this release that need care, a sentence each.
    """

    name: str
    tensorrt: str | None
    cuda: str | None
    python: str | None
    opset: int | None
    traps: tuple[str, ...]


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

    @property
    def opset_ceiling(self) -> int | None:
        """The opset that every release of the target takes; None where TensorRT sets no limit."""
        return min((release.opset for release in self.releases if release.opset is not None), default=None)

    @property
    def traps(self) -> tuple[str, ...]:
        """The traps of all its releases, each once, in order."""
        return tuple(dict.fromkeys(trap for release in self.releases for trap in release.traps))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values, with ``opset_ceiling``."""
        return {**dataclasses.asdict(self), "opset_ceiling": self.opset_ceiling}


JETPACK_6_2 = Release("JetPack 6.2", "10.3", "12.6", "3.10", 20, (*_TENSORRT_10_3, *_EVERY_TENSORRT))
# No published ceiling of 10.13 is at hand; a later minor version takes at least what 10.3 takes.
JETPACK_7_1 = Release("JetPack 7.1", "10.13", None, "3.12", 20, _EVERY_TENSORRT)
JETPACK_7_2 = Release("JetPack 7.2", "10.16", "13.2", "3.12", 24, _EVERY_TENSORRT)
JETPACK_7_2_2 = Release("JetPack 7.2.2", "11.4", None, "3.12", 25, _EVERY_TENSORRT)
TENSORRT_10_16 = Release("TensorRT 10.16", "10.16", None, None, 24, _EVERY_TENSORRT)
TENSORRT_11_4 = Release("TensorRT 11.4", "11.4", None, None, 25, _EVERY_TENSORRT)

_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "fp4")
_ORIN = (JETPACK_6_2, JETPACK_7_2)
_DESKTOP = (TENSORRT_10_16, TENSORRT_11_4)

# fmt: off
_ROWS = (
    #      name, device                              sm    GB    shared GB/s  fp16  int8  fp8   fp4
    Target("cpu", "any CPU, by ONNX Runtime",        None, None, None,  None, None, None, None, None,
           ("fp32", "fp16", "int8", "int4"), (), "fp16 saves space, not time: ONNX Runtime computes it in fp32."),
    Target("jetson-orin-nano", "Jetson Orin Nano 8GB", 87,    8, True,   102,   17,   33, None, None,
           _AMPERE, _ORIN, "Figures of the Super power mode."),
    Target("jetson-orin-nx", "Jetson Orin NX 16GB",    87,   16, True,   102,   15,   30, None, None,
           _AMPERE, _ORIN),
    Target("jetson-orin", "Jetson AGX Orin 64GB",      87,   64, True,   205,   42,   85, None, None,
           _AMPERE, (*_ORIN, JETPACK_7_2_2), "The 32GB module: 27 TFLOPS fp16, 54 TOPS int8."),
    Target("jetson-thor", "Jetson T5000",             110,  128, True,   273,  258,  517, None, None,
           _BLACKWELL, (JETPACK_7_1, JETPACK_7_2, JETPACK_7_2_2)),
    Target("rtx-30", "GeForce RTX 3090",               86,   24, False,  936,   71,  284, None, None,
           _AMPERE, _DESKTOP),
    Target("rtx-40", "GeForce RTX 4090",               89,   24, False, 1008,  165,  660, None, None,
           _ADA, _DESKTOP),
    Target("rtx-50", "GeForce RTX 5090",              120,   32, False, 1792,  209,  838, None, None,
           _BLACKWELL, _DESKTOP),
    Target("a100", "A100 80GB",                        80,   80, False, 2039,  312,  624, None, None,
           _AMPERE, _DESKTOP),
    Target("h100", "H100 SXM",                         90,   80, False, 3350,  989, 1979, None, None,
           _ADA, _DESKTOP),
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
