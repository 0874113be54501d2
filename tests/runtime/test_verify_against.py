"""Two backends, or two bundles, compared output by output: what agrees passes, and what does not is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import tiny_engines
from click.testing import CliRunner
from golden import golden_bundle
from onnx import numpy_helper

pytest.importorskip("polygraphy", reason="comparing needs Polygraphy")

from svdprune.runtime import open_bundle
from svdprune.runtime.bundle import write_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import BundleError, NumericalError, UserError
from svdprune.runtime.manifest import ModelInfo
from svdprune.runtime.verify_against import verify_against

OUTPUTS = ["kept_indices", "scores", "features", "logits"]


@pytest.fixture(scope="module")
def right(bundle, tmp_path_factory):
    """The tiny bundle with its golden case."""
    return golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")


def changed(source: Path, path: Path, name: str, tensor: str, change) -> Path:
    """A copy of a bundle with one initializer of one of its graphs replaced by `change` of it."""
    opened = open_bundle(source)
    with write_bundle(path) as writer:
        for file in opened.manifest.files:
            shutil.copy(source / file, writer.file(file))
        model = onnx.load(source / name)
        target = next(item for item in model.graph.initializer if item.name == tensor)
        target.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(target)), tensor))
        onnx.save(model, writer.file(name))
        writer.manifest = opened.manifest
    return path


def test_a_backend_agrees_with_itself(right):
    found = verify_against(right, "onnxruntime", threads=1)
    assert found.passed and found.failed == []
    assert [difference.output for difference in found.differences] == OUTPUTS
    kept, scores, features, logits = found.differences
    assert kept.measured == {"overlap": 1.0, "identical": "4 of 4"}
    nothing = {"cosine": pytest.approx(1.0, abs=1e-6), "L2": 0.0, "max error": 0.0}
    assert scores.measured == nothing
    assert features.measured == {**nothing, "worst row's cosine": 1.0}
    assert logits.measured == {**nothing, "rank of the other's best": 1}
    assert logits.steps == 6  # the prompt and the five tokens of the golden answer


def test_other_features_are_told_from_other_scores(right, tmp_path):
    noise = np.random.default_rng(0).normal(size=(3, tiny.HIDDEN)).astype(np.float32)
    other = changed(right, tmp_path / "other", "vision.onnx", "projector", lambda a: a + 0.3 * noise)
    found = verify_against(right, str(other), threads=1)
    assert found.failed == ["features"]
    features = found.differences[2]
    assert 0 < features.measured["worst row's cosine"] <= features.measured["cosine"] < 0.9999
    assert features.measured["L2"] > features.measured["max error"] > 0
    assert str(other) in found.theirs and str(right) in found.ours


def test_one_wrong_row_is_told_though_the_whole_is_near(right, tmp_path, monkeypatch):
    """The cosine of the whole array hides a small row; the worst row's does not."""
    from svdprune.runtime.vision.onnxruntime import OnnxVision

    encode, calls = OnnxVision.encode, []

    def second_time(self, pixels, on_device=False, slots=None):
        output = encode(self, pixels, on_device, slots)
        calls.append(1)
        if len(calls) == 1:
            output.features[0, 1] *= 1e-3
        else:
            output.features[0, 1] *= -1e-3
        return output

    monkeypatch.setattr(OnnxVision, "encode", second_time)
    found = verify_against(right, "onnxruntime", threads=1)
    features = found.differences[2]
    assert found.failed == ["features"] and features.measured["cosine"] > 0.9999
    assert features.measured["worst row's cosine"] == pytest.approx(-1.0)


def test_another_choice_of_tokens_is_told(right, tmp_path):
    other = changed(right, tmp_path / "other", "vision.onnx", "unit", lambda a: -a)
    found = verify_against(right, str(other), threads=1)
    assert "kept_indices" in found.failed and "scores" in found.failed and "logits" not in found.failed
    assert found.differences[0].measured["overlap"] < 0.5


def test_other_logits_are_told_alone(right, tmp_path):
    other = changed(right, tmp_path / "other", "decoder/model.onnx", "head", lambda a: np.roll(a, 1, axis=1))
    found = verify_against(right, str(other), threads=1)
    assert found.failed == ["logits"]
    assert found.differences[3].measured["rank of the other's best"] > 1


def test_half_precision_is_held_to_its_own_limits(right, bundle, tmp_path):
    """What an fp32 bundle may not differ by, an fp16 one may."""
    half = golden_bundle(bundle, tmp_path / "half", vision="fp16", decoder="int4")
    noise = np.random.default_rng(0).normal(size=(3, tiny.HIDDEN)).astype(np.float32)
    near = changed(half, tmp_path / "near", "vision.onnx", "projector", lambda a: a + 0.02 * noise)
    found = verify_against(right, str(near), threads=1)
    assert found.passed and found.differences[2].allowed == {"cosine at least": 0.995}
    assert found.differences[3].allowed == {"cosine at least": 0.95, "rank at most": 3}
    same = changed(right, tmp_path / "same", "vision.onnx", "projector", lambda a: a + 0.02 * noise)
    assert verify_against(right, str(same), threads=1).failed == ["features"]


@pytest.mark.parametrize("api", tiny_engines.APIS)
def test_engines_are_compared_with_onnx_runtime(api, tmp_path, monkeypatch):
    _, trt = tiny_engines.machine(monkeypatch, api)
    name = trt.__name__
    path = golden_bundle(tiny_engines.engine_bundle(tmp_path / "engines"), tmp_path / "golden")
    for part in ("vision", "decoder"):
        tiny_engines.build(path, part, name)
    found = verify_against(path, "onnxruntime", vision=name, decoder=name, threads=1)
    assert found.passed, found.differences
    assert [difference.output for difference in found.differences] == OUTPUTS
    assert (found.ours, found.theirs) == (
        f"vision by {name}, decoder by {name}",
        "vision by onnxruntime, decoder by onnxruntime",
    )
    assert 0 < found.differences[3].measured["max error"] < 1e-3  # another graph: not the same to the last bit
    assert verify_against(path, name, threads=1).passed  # and the other way round


def test_an_engine_of_other_weights_is_told(tmp_path, monkeypatch):
    tiny_engines.machine(monkeypatch)
    path = golden_bundle(tiny_engines.engine_bundle(tmp_path / "engines"), tmp_path / "golden")
    other = changed(path, tmp_path / "other", "vision.onnx", "projector", lambda a: a[:, ::-1].copy())
    fine, wrong = tiny_engines.build(path, "vision"), tiny_engines.build(other, "vision")
    shutil.copy(wrong.path, fine.path)
    info = {**fine.info, "bytes": wrong.info["bytes"], "sha256": wrong.info["sha256"]}
    (fine.path.parent / "build.json").write_text(json.dumps(info), encoding="utf-8")
    found = verify_against(path, "onnxruntime", vision="tensorrt", threads=1)
    assert found.failed == ["features"]


@pytest.mark.parametrize(
    ("against", "words"),
    [
        ("tensorflow", "is neither a bundle's folder nor a backend: choose one of onnxruntime, onnxruntime-cuda"),
        ("no/such/folder", "is neither a bundle's folder nor a backend"),
        ("transformers", "reads the original weights"),
    ],
)
def test_what_cannot_be_compared_is_said(right, against, words):
    with pytest.raises(UserError, match=words):
        verify_against(right, against, threads=1)


def test_a_checkpoint_that_nobody_reads_is_refused(right):
    with pytest.raises(UserError, match="--checkpoint is for the decoder transformers"):
        verify_against(right, "onnxruntime", threads=1, checkpoint="somewhere")


def test_bundles_of_other_models_are_refused(right, bundle, tmp_path):
    floats = tiny.make_bundle(tmp_path / "floats", vision={"input": "float32"})
    with pytest.raises(UserError, match=r"differ in pixels \(uint8 and float32\)"):
        verify_against(right, str(floats), threads=1)
    newer = tiny.make_bundle(tmp_path / "newer", model=ModelInfo("tiny", "llava", sha256="0" * 64))
    with pytest.raises(UserError, match=r"differ in weights, by SHA-256 \(None and 000"):
        verify_against(right, str(newer), threads=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        verify_against(right, str(tmp_path / "empty"), threads=1)
    with pytest.raises(BundleError, match="export the bundle again"):
        verify_against(bundle, "onnxruntime", threads=1)  # without a golden case


def test_nan_is_an_error(bundle, right, tmp_path):
    nan = tiny.make_bundle(tmp_path / "nan", nan=True)
    with pytest.raises(NumericalError):
        verify_against(right, str(nan), threads=1)


def test_the_command_prints_both_tables(right, tmp_path):
    runner = CliRunner()
    fine = runner.invoke(group, ["verify", str(right), "--threads", "1", "--against", "onnxruntime"])
    assert fine.exit_code == 0, fine.output
    assert "kept tokens" in fine.output and "kept_indices" in fine.output and "worst row's cosine" in fine.output
    other = changed(right, tmp_path / "other", "decoder/model.onnx", "head", lambda a: np.roll(a, 1, axis=1))
    told = runner.invoke(group, ["verify", str(right), "--threads", "1", "--against", str(other), "--json"])
    assert told.exit_code == 1 and "beyond tolerance: logits" in told.stderr
    content = json.loads(told.stdout)
    assert content["passed"] is False and all(stage["passed"] for stage in content["stages"])
    assert [item["passed"] for item in content["against"]["differences"]] == [True, True, True, False]
    plain = json.loads(runner.invoke(group, ["verify", str(right), "--threads", "1", "--json"]).stdout)
    assert plain["passed"] is True and "against" not in plain
