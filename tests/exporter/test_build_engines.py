"""From a checkpoint to engines: an exported bundle whose graphs TensorRT-RTX really builds, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdprune.exporter.export import ExportRequest, export_model
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines import build as module
from svdprune.runtime.engines.build import BuildRequest, build_engines
from svdprune.runtime.engines.store import list_engines

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_bundle_for_an_rtx_40_builds_both_engines(
    precision: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "local_gpu", lambda: None)
    request = ExportRequest(str(tiny_llava), "4", target="rtx-40", precision=precision, rank=4, out=tmp_path / "bundle")
    export_model(request)
    report = build_engines(tmp_path / "bundle", BuildRequest())
    assert {result.part: result.engine.selftest for result in report.parts} == {
        "vision": "not run: no GPU",
        "decoder": "not run: no GPU",
    }
    for engine in list_engines(open_bundle(tmp_path / "bundle")):
        assert engine.info["layers"] > 0 and engine.key.sm == 89 and engine.info["target"] == "rtx-40"
