"""The golden case on fresh engines: an engine that does not compute what the checkpoint computes is not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.engines.choice import Choice
from svdprune.runtime.engines.store import PASSED, EngineFile, drop_engine, note_engine
from svdprune.runtime.engines.watch import Report
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.machine import Gpu

if TYPE_CHECKING:
    from svdprune.runtime.verify import VerifyReport

INTERRUPTED = "not run: interrupted"
NO_GPU = "not run: no GPU"
_PARTS_OF_STAGE = {  # what a failed stage speaks against
    "kept tokens": ("vision",),
    "vision features": ("vision",),
    "first-step logits": ("decoder",),
}


def untested(choice: Choice, gpu: Gpu | None) -> str:
    """What stands for the self-test before it has run: why it cannot run here, or, where it can, that it has not."""
    if gpu is None:
        return NO_GPU
    return INTERRUPTED if gpu.sm == choice.sm else f"not run: this machine's GPU is sm {gpu.sm}"


def selftest(
    bundle: Bundle, choice: Choice, engines: list[EngineFile], gpu: Gpu | None, report: Report
) -> tuple[list[EngineFile], list[str]]:
    """Verify ``engines`` with the golden case, and note the outcome in each ``build.json``.

    A part without an engine among them runs by ONNX Runtime.

    Returns:
        The engines as noted, and sentences for the user.

    Raises:
        SvdpruneError: an engine failed; those that did are removed.
    """
    reason = untested(choice, gpu)
    if reason != INTERRUPTED:
        kept = [e if e.selftest == reason else note_engine(e, selftest=reason) for e in engines]
        said = f"the self-test was {reason}; run `svdprune build` or `svdprune verify` where the GPU is"
        return kept, [said]
    from svdprune.runtime.verify import verify

    report("self-test by the golden case", None)
    parts = {engine.part: choice.trt.name for engine in engines}
    try:
        verdict = verify(bundle.path, parts.get("vision", "onnxruntime"), parts.get("decoder", "onnxruntime"))
    except SvdpruneError as error:  # it cannot even run
        for engine in engines:
            drop_engine(engine)
        raise SvdpruneError(f"the self-test failed and the engine was not kept: {error}") from error
    failed = {part for stage in verdict.failed for part in _PARTS_OF_STAGE.get(stage, tuple(parts))}
    for engine in engines:
        if engine.part in failed:
            drop_engine(engine)
    measured = _measured(verdict)
    kept = [note_engine(e, selftest=PASSED, selftest_measured=measured) for e in engines if e.part not in failed]
    if verdict.failed:
        lost = ", ".join(sorted(failed & set(parts))) or "none"
        raise SvdpruneError(
            f"the self-test failed ({', '.join(verdict.failed)} out of tolerance: {_figures(verdict)}), not kept: "
            f"{lost}; export the bundle with --precision fp32, or report it with the TensorRT version"
        )
    return kept, [f"the self-test passed: {_figures(verdict)}"]


def _measured(verdict: VerifyReport) -> dict[str, Any]:
    return {stage.name: stage.measured for stage in verdict.stages}


def _figures(verdict: VerifyReport) -> str:
    """The judged numbers, in short."""
    numbers = []
    for stage in verdict.stages:
        for name, value in stage.measured.items():
            if isinstance(value, float) and name in ("overlap", "cosine"):
                numbers.append(f"{stage.name} {name} {value:.5g}")
    return ", ".join(numbers)
