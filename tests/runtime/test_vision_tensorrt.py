"""The vision backends ``tensorrt`` and ``tensorrt_rtx``, on fakes that compute: the same output and the same checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_engines

from svdprune.runtime import BundleError, NumericalError, UserError, open_bundle
from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.vision import open_vision


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, tiny.SIDE, tiny.SIDE, 3), np.uint8)


@pytest.mark.parametrize("api", tiny_engines.APIS)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_the_output_is_onnx_runtime_s(api: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, trt = tiny_engines.machine(monkeypatch, api)
    path = tiny.make_bundle(tmp_path / "bundle", vision={"input": kind})
    tiny_engines.build(path, "vision", trt.__name__)
    bundle = open_bundle(path)
    engine, reference = open_vision(trt.__name__, bundle), open_vision("onnxruntime", bundle, 1)
    assert (engine.name, reference.device) == (trt.__name__, None)
    assert engine.device is not None
    for count in (1, 2):
        pixels = pictures(count) if kind == "uint8" else pictures(count).transpose(0, 3, 1, 2) / np.float32(255)
        ours, theirs = engine.encode(pixels), reference.encode(pixels)
        for name in ("features", "kept_indices", "scores"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), strict=True)
    engine.close()
    reference.close()
    assert (cuda.held, len(cuda.pinned), cuda._streams) == (0, 0, set())


def test_features_may_stay_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = tiny_engines.machine(monkeypatch)
    path = tiny.make_bundle(tmp_path / "bundle")
    tiny_engines.build(path, "vision")
    engine = open_vision("tensorrt", open_bundle(path))
    output = engine.encode(pictures(2), on_device=True)
    assert isinstance(output.features_in_place, DeviceArray)
    before = cuda.copies["DeviceToHost"]
    assert before == 2 * (8 * tiny.KEEP + 4 * tiny.TOKENS)
    wanted = engine.encode(pictures(2)).features
    np.testing.assert_array_equal(output.features, wanted)
    assert output.features is output.features  # fetched once
    with pytest.raises(ValueError, match="leaves no array on a GPU"):
        open_vision("onnxruntime", open_bundle(path), 1).encode(pictures(1), on_device=True)


def test_pixels_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engines.machine(monkeypatch)
    path = tiny.make_bundle(tmp_path / "bundle")
    tiny_engines.build(path, "vision")
    engine = open_vision("tensorrt", open_bundle(path))
    with pytest.raises(UserError, match=r"takes uint8 pixels \[B, 28, 28, 3\], not float32 \[1, 28, 28, 3\]"):
        engine.encode(pictures(1).astype(np.float32))
    for count in (0, 3):
        with pytest.raises(UserError, match=rf"encodes up to 2 pictures at once, not {count}: give fewer"):
            engine.encode(pictures(count))


@pytest.mark.parametrize("part", ["scores", "features"])
def test_nan_is_an_error_not_a_choice(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engines.machine(monkeypatch)
    path = tiny.make_bundle(tmp_path / "bundle", poison=part)
    tiny_engines.build(path, "vision")
    engine = open_vision("tensorrt", open_bundle(path))
    engine.encode(pictures(1))
    with pytest.raises(NumericalError, match=f"{part} as NaN or infinity"):
        engine.encode(np.zeros_like(pictures(1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 3}, r"gave features float32 \[1, 4, 32\], the manifest says float32 \[1, 3, 32\]"),
        ({"tokens": 12, "grid": [3, 4]}, r"gave scores float32 \[1, 16\], the manifest says float32 \[1, 12\]"),
    ],
)
def test_a_manifest_that_says_otherwise(
    change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_engines.machine(monkeypatch)
    path = tiny.make_bundle(tmp_path / "bundle", vision=change)
    tiny_engines.build(path, "vision")
    with pytest.raises(BundleError, match=words):
        open_vision("tensorrt", open_bundle(path)).encode(pictures(1))


def test_an_engine_of_another_kind_of_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is where the vision engine should be: nothing of it stays in the GPU."""
    cuda, _ = tiny_engines.machine(monkeypatch)
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    monkeypatch.setattr(tiny_engines, "graph_digest", lambda bundle, part: "0" * 64)
    monkeypatch.setattr("svdprune.runtime.engines.store.graph_digest", lambda bundle, part: "0" * 64)
    decoder = tiny_engines.build(path, "decoder").path.read_bytes()
    vision = tiny_engines.build(path, "vision")
    vision.path.write_bytes(decoder)
    vision.info["bytes"] = len(decoder)
    (vision.path.parent / "build.json").write_text(__import__("json").dumps(vision.info))
    with pytest.raises(BundleError, match=r"vision.engine lacks pixels: export the bundle and build the engine again"):
        open_vision("tensorrt", open_bundle(path), verify=False)
    assert (cuda.held, cuda._streams) == (0, set())
