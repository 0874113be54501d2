"""ONNX Runtime sessions: opened with the asked provider or refused, faults told as one sentence."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.lazy import require

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def open_session(path: Path, threads: int | None, provider: str = CPU, profile: Path | None = None) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        path: the .onnx file; its external data lie beside it.
        threads: threads inside one operator; None leaves it to ONNX Runtime (all cores).
        provider: an execution provider's name.
        profile: where to write the time of every node (the start of a file's name; ``session.end_profiling`` gives the
            rest), None to measure none.

    Raises:
        UserError: the provider is not in this installation of onnxruntime, or it does not start on this machine.
        BundleError: the graph cannot be read or run by this onnxruntime.
    """
    onnxruntime = require("onnxruntime", feature="the onnxruntime backend")
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}, it must be 1 or more")
    if provider not in onnxruntime.get_available_providers():
        raise UserError(
            f"this onnxruntime has no {provider} (it has {', '.join(onnxruntime.get_available_providers())}): "
            "pip install 'svdprune[cuda]' in place of onnxruntime, or use the backend `onnxruntime`"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings on graph clean-up are of no use to the caller
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers: list[Any] = [CPU]
    faults = ort_errors()
    if provider != CPU:
        # Its default rounds factors of float32 products to ten bits: that ruins the choice of tokens, docs/fidelity.md
        providers = [(provider, {"use_tf32": "0"}), CPU]
        faults = (*faults, RuntimeError, ValueError)
        _preload(onnxruntime)
    try:
        # Without this, a session whose GPU fails prints a line and goes on by the CPU, at the start and in any run.
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except faults as error:
        if provider != CPU and re.search("cuda|cudnn|cublas", str(error), re.IGNORECASE):
            raise UserError(
                f"{provider} does not start on this machine ({_first_line(error)}): check the driver and the CUDA "
                "libraries, or use the backend `onnxruntime`"
            ) from error
        raise BundleError(
            f"{path} does not load in onnxruntime {onnxruntime.__version__} ({_first_line(error)}): "
            "upgrade onnxruntime, or export the bundle again"
        ) from error
    if provider not in session.get_providers():  # libraries that are missing are a warning to onnxruntime
        raise UserError(
            f"{provider} does not start on this machine: check the driver and the CUDA libraries, "
            "or use the backend `onnxruntime`"
        )
    return session


def _preload(onnxruntime: Any) -> None:
    """Load the CUDA libraries that pip installed, which no search path names; its complaints are for stderr."""
    with redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()


def ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions that onnxruntime's native part raises; they share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    names = (
        *("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf"),
        *("ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail"),
    )
    return tuple(getattr(native, name) for name in names)


def check_names(path: Path, kind: str, expected: list[str], found: list[str]) -> None:
    """Refuse a graph that lacks an expected input or output, or has another input.

    Raises:
        BundleError: naming it.
    """
    missing = [name for name in expected if name not in found]
    other = [name for name in found if name not in expected] if kind == "input" else []
    if missing or other:
        problem = f"lacks the {kind} {missing[0]}" if missing else f"has the unknown input {other[0]}"
        raise BundleError(f"{path} {problem}: export the bundle again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
