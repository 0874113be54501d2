"""Which TensorRT builds, and which parts it can build: decided, or refused with the reason, before any work."""

from __future__ import annotations

from dataclasses import dataclass

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.engines.adapter import RUNTIMES, TensorRt, find_tensorrt
from svdprune.runtime.engines.key import PARTS, graph_files
from svdprune.runtime.errors import UserError
from svdprune.runtime.machine import Gpu
from svdprune.runtime.targets import TARGETS, Target

AUTO, ALL = "auto", "all"


@dataclass(frozen=True)
class Choice:
    """The TensorRT that builds, for which target and compute capability; ``notes`` are sentences for the user."""

    trt: TensorRt
    target: Target
    sm: int
    notes: list[str]


def choose(target: Target, runtime: str, gpu: Gpu | None, own: bool) -> Choice:
    """The TensorRT to build with.

    Args:
        runtime: "tensorrt", "tensorrt_rtx", or "auto": full TensorRT where the target's GPU is in this machine, else
            TensorRT-RTX, which needs none.
        gpu: this machine's.
        own: whether the target is the bundle's own, which the caller did not name.

    Raises:
        UserError: the target has no TensorRT, none is installed, or it cannot build for this target here.
    """
    if target.sm is None:
        named = "the bundle was exported for" if own else "the target is"
        raise UserError(
            f"{named} {target.name}, which has no TensorRT and runs by ONNX Runtime: name a target with a GPU "
            f"(`--target auto` for this machine's, or one of {', '.join(_buildable())})"
        )
    here = gpu is not None and gpu.sm == target.sm
    trt = _installed(target, gpu, here) if runtime == AUTO else find_tensorrt(runtime)
    _check(trt, target, gpu)
    notes = []
    if not trt.needs_gpu and not here:
        notes.append(
            f"{trt.title} shows that the graph builds for sm {target.sm}; this is no result of TensorRT itself and "
            "nothing was run"
        )
    return Choice(trt, target, target.sm, notes)


def choose_parts(bundle: Bundle, trt: TensorRt, part: str) -> tuple[list[str], list[str]]:
    """The parts to build and notes on those that are left out.

    Raises:
        UserError: no such part, or one asked for by name that the bundle or this TensorRT does not have.
    """
    if part not in (*PARTS, ALL):
        raise UserError(f"no part is called {part!r}: choose one of {', '.join((*PARTS, ALL))}")
    if part != "decoder" and part != ALL:
        return [part], []
    reason = _no_decoder(bundle, trt)
    if part == ALL:
        return (["vision"], [f"no decoder engine: {reason}"]) if reason else (list(PARTS), [])
    if reason:
        raise UserError(f"no decoder engine can be built: {reason}")
    return [part], []


def _no_decoder(bundle: Bundle, trt: TensorRt) -> str:
    """Why there is no decoder engine; "" when there can be."""
    if bundle.manifest.decoder.engine is None:
        return bundle.manifest.decoder.engine_refused or (
            "the bundle has no graph for it, the vision engine is chained to ONNX Runtime's decoder"
        )
    graph_files(bundle, "decoder")
    if not trt.takes_decoder:
        return (
            f"{trt.title} lacks the operators of its graph (they came with 10.15), the vision engine is chained to "
            "ONNX Runtime's decoder"
        )
    return ""


def _installed(target: Target, gpu: Gpu | None, here: bool) -> TensorRt:
    """The first TensorRT that is installed and can build for the target here; the refusals are told, if none."""
    refusals = []
    for name in RUNTIMES if here else RUNTIMES[1:]:
        try:
            trt = find_tensorrt(name)
            _check(trt, target, gpu)
            return trt
        except UserError as error:
            refusals.append(str(error))
    alone = "" if here else f"this machine has no GPU of sm {target.sm}, so that TensorRT-RTX alone could build: "
    raise UserError(alone + "; ".join(refusals))


def _check(trt: TensorRt, target: Target, gpu: Gpu | None) -> None:
    """Refuse what this TensorRT cannot build on this machine."""
    assert target.sm is not None
    if not trt.needs_gpu:
        if target.sm not in trt.capabilities:
            raise UserError(f"no engine for {target.name} can be built here: {trt.refusal(target.sm)}")
        return
    gate = "or show that the graph builds, with TensorRT-RTX (--runtime tensorrt_rtx --target rtx-40)"
    if gpu is None:
        raise UserError(
            f"{trt.title} builds on the GPU that the engine is for, and there is no GPU here: run `svdprune build` on "
            f"the {target.device}, {gate}"
        )
    if gpu.sm != target.sm:
        raise UserError(
            f"{trt.title} builds for the GPU it runs on, here the {gpu.name} (sm {gpu.sm}), and the target is "
            f"{target.name} (sm {target.sm}): give `--target auto`, or run `svdprune build` on the {target.device}"
        )


def _buildable() -> list[str]:
    return [name for name, row in TARGETS.items() if row.sm is not None]
