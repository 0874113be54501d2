"""Two exports of one checkpoint with one decoder on the disk, and when that is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from svdprune.exporter.export import ExportRequest, export_model
from svdprune.runtime import BundleError, UserError, load


@pytest.fixture(scope="module")
def first(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportRequest]:
    """A bundle for a workstation's GPU, with the decoder graph for engines, and what was asked for."""
    out = tmp_path_factory.mktemp("bundles") / "k4"
    request = ExportRequest(str(tiny_llava), "4", target="rtx-40", out=out, select="norm", report=False, cache=128)
    export_model(request)
    return out, request


def test_the_second_bundle_has_the_decoder_of_the_first(first: tuple[Path, ExportRequest]) -> None:
    bundle, request = first
    out = bundle.parent / "k2"
    summary = export_model(dataclasses.replace(request, keep="2", out=out, share_decoder_with=bundle))
    assert summary.shared == bundle
    names = sorted(path.name for path in (out / "decoder").iterdir())
    assert names == sorted(path.name for path in (bundle / "decoder").iterdir())
    assert any(name.startswith("engine") for name in names)
    assert all(os.path.samefile(out / "decoder" / name, bundle / "decoder" / name) for name in names)
    assert not os.path.samefile(out / "vision.onnx", bundle / "vision.onnx")
    picture = np.random.default_rng(0).integers(0, 256, (42, 42, 3), np.uint8)
    with load(out) as pruned, load(bundle) as other:
        assert pruned.ask(picture, "Where?", max_new_tokens=2).tokens.vision_kept == 2
        assert other.ask(picture, "Where?", max_new_tokens=2).tokens.vision_kept == 4


def test_without_the_decoder_for_engines_only_the_other_is_shared(first: tuple[Path, ExportRequest]) -> None:
    bundle, request = first
    out = bundle.parent / "chained"
    export_model(dataclasses.replace(request, out=out, cache=None, decoder_engine="none", share_decoder_with=bundle))
    assert sorted(path.name for path in (out / "decoder").iterdir()) == [
        "embed_tokens.npy",
        "model.onnx",
        "model.onnx.data",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decoder_precision": "int4"}, "is fp32, not int4: leave out --share-decoder-with, or give"),
        ({"cache": 200}, "with 128 cache rows, this export wants one with 200: .* give --cache 128"),
    ],
)
def test_another_decoder_is_refused(
    first: tuple[Path, ExportRequest], changes: dict[str, object], sentence: str
) -> None:
    bundle, request = first
    out = bundle.parent / "refused"
    asked = dataclasses.replace(request, out=out, share_decoder_with=bundle, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        export_model(asked)
    assert not out.exists()


def _changed(bundle: Path, place: Path, part: str, value: dict[str, object]) -> Path:
    copy = Path(shutil.copytree(bundle, place))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest[part] |= value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("model", {"sha256": "0" * 64}, "was made from other weights"),
        ("written_by", {"svdprune": "0.0.1"}, "was written by svdprune 0.0.1, this is"),
    ],
)
def test_a_decoder_that_this_export_would_not_write_is_refused(
    first: tuple[Path, ExportRequest], tmp_path: Path, part: str, value: dict[str, object], sentence: str
) -> None:
    bundle, request = first
    other = _changed(bundle, tmp_path / "other", part, value)
    with pytest.raises(UserError, match=sentence):
        export_model(dataclasses.replace(request, out=tmp_path / "new", share_decoder_with=other))


def test_a_damaged_decoder_is_not_taken_over(first: tuple[Path, ExportRequest], tmp_path: Path) -> None:
    bundle, request = first
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    content = bytearray((other / "decoder/model.onnx.data").read_bytes())
    content[100] ^= 1
    (other / "decoder/model.onnx.data").write_bytes(content)
    with pytest.raises(BundleError, match=r"model.onnx.data was changed since"):
        export_model(dataclasses.replace(request, out=tmp_path / "new", share_decoder_with=other))
    assert not (tmp_path / "new").exists()
