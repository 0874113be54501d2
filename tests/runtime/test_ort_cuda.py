"""The provider of ``onnxruntime-cuda`` as it is asked for; no GPU is needed to look at that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from svdprune.runtime import BundleError, UserError, open_bundle
from svdprune.runtime.ort import CPU, CUDA
from svdprune.runtime.vision import open_vision


class Sessions:
    """Stands in for ``onnxruntime.InferenceSession`` where a GPU would be; every other provider is as it is."""

    def __init__(self, error: Exception | None = None, starts: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error, self.starts = error, starts
        self.real = onnxruntime.InferenceSession

    def __call__(self, path: str, options: Any, **asked: Any) -> Any:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        session = self.real(path, options, providers=[CPU])
        session.get_providers = lambda: [CUDA, CPU] if self.starts else [CPU]
        return session


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    sessions = Sessions()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", sessions)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas"))
    return sessions


def test_cuda_computes_in_full_precision_and_never_falls_back(
    cuda: Sessions, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_vision("onnxruntime-cuda", open_bundle(bundle)).name == "onnxruntime-cuda"
    assert cuda.asked == [{"providers": [(CUDA, {"use_tf32": "0"}), CPU], "enable_fallback": 0}]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "Failed to load libcublas\n")  # stdout is for the answer


def test_cuda_that_is_not_there_in_the_end(cuda: Sessions, bundle: Path) -> None:
    cuda.starts = False
    with pytest.raises(UserError, match=r"CUDAExecutionProvider does not start on this machine: check the driver"):
        open_vision("onnxruntime-cuda", open_bundle(bundle))


def test_cuda_that_does_not_start(cuda: Sessions, bundle: Path) -> None:
    cuda.error = RuntimeError("CUDA failure 35: CUDA driver version is insufficient\nmore")
    with pytest.raises(UserError, match=r"does not start on this machine \(CUDA failure 35: .*insufficient\): check"):
        open_vision("onnxruntime-cuda", open_bundle(bundle))


def test_a_graph_that_does_not_load(cuda: Sessions, bundle: Path) -> None:
    cuda.error = RuntimeError("Could not find an implementation for TopK")
    with pytest.raises(BundleError, match=r"does not load in onnxruntime .*Could not find an implementation for TopK"):
        open_vision("onnxruntime-cuda", open_bundle(bundle))
