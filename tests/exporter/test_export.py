"""A tiny checkpoint all the way to a bundle, for every selector, and what happens when it cannot be written."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from svdprune.exporter import export as exporter
from svdprune.exporter import vision_file
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference, reference_vision
from svdprune.exporter.rules import Violation, check_target
from svdprune.exporter.selection import SelectorConfig, selector_names
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.verify import verify

KEEP = 4


def graph(folder: Path, out: Path, name: str = "leverage", keep: int = KEEP, **options: object) -> ort.InferenceSession:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    selector = SelectorConfig(name=name, rank=4)
    model = build_vision(checkpoint, family, family.describe(checkpoint), selector, keep, **options)  # type: ignore[arg-type]
    save_graph(model, out / "vision.onnx")
    return ort.InferenceSession(out / "vision.onnx", providers=["CPUExecutionProvider"])


def pictures(count: int, side: int = 42) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalised(raw: np.ndarray, folder: Path) -> np.ndarray:
    spec = family_of((c := Checkpoint(folder)).config, "tiny").describe(c)
    scaled = (raw.astype(np.float32) * spec.rescale - np.float32(spec.mean)) / np.float32(spec.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", selector_names())
def test_the_graph_keeps_what_the_reference_keeps(tiny_llava: Path, tmp_path: Path, name: str) -> None:
    keep = 9 if name == "none" else KEEP
    session = graph(tiny_llava, tmp_path, name, keep)
    raw = pictures(3)
    features, kept, scores = session.run(["features", "kept_indices", "scores"], {"pixels": raw})
    assert (features.shape, kept.shape, scores.shape) == ((3, keep, 48), (3, keep), (3, 9))
    assert (features.dtype, kept.dtype, scores.dtype) == (np.float32, np.int64, np.float32)
    assert (np.diff(kept, axis=1) > 0).all()
    checkpoint = Checkpoint(tiny_llava)
    family = family_of(checkpoint.config, "tiny")
    model = load_reference(checkpoint, print)
    for i, pixels in enumerate(normalised(raw, tiny_llava)):
        selector = SelectorConfig(name=name, rank=4)
        wanted = reference_vision(model, family, family.describe(checkpoint), pixels, selector, keep)
        np.testing.assert_array_equal(kept[i], wanted.kept)
        np.testing.assert_allclose(scores[i], wanted.scores, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(features[i], wanted.features, rtol=1e-3, atol=1e-4)


def test_a_batch_is_its_pictures_one_by_one(tiny_llava: Path, tmp_path: Path) -> None:
    session = graph(tiny_llava, tmp_path)
    raw = pictures(3)
    together = session.run(None, {"pixels": raw})
    for i in range(3):
        for whole, alone in zip(together, session.run(None, {"pixels": raw[i : i + 1]}), strict=True):
            np.testing.assert_allclose(whole[i], alone[0], rtol=1e-4, atol=1e-5)


def test_both_inputs_give_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "float").mkdir()
    raw = pictures(2)
    first = graph(tiny_llava, tmp_path / "raw").run(None, {"pixels": raw})
    second = graph(tiny_llava, tmp_path / "float", raw=False).run(None, {"pixels": normalised(raw, tiny_llava)})
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_fp16_is_the_encoder_alone(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "16").mkdir()
    half = graph(tiny_llava, tmp_path / "16", precision="fp16")
    model = onnx.load(tmp_path / "16" / "vision.onnx")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert {v for k, v in kinds.items() if k.startswith("encoder.")} == {onnx.TensorProto.FLOAT16}
    scorer = {v for k, v in kinds.items() if k.startswith("scorer/")}
    assert onnx.TensorProto.FLOAT16 not in scorer
    raw = pictures(2)
    features, _, scores = half.run(None, {"pixels": raw})
    _, _, full = graph(tiny_llava, tmp_path).run(None, {"pixels": raw})
    assert (features.dtype, scores.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(scores, full, atol=0.01)


def test_the_graph_is_checked_and_bare(tiny_llava: Path, tmp_path: Path) -> None:
    graph(tiny_llava, tmp_path)
    model = onnx.load(tmp_path / "vision.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert {n.domain for n in model.graph.node} == {""}
    text = str(model)[:100_000]
    assert str(Path(__file__).parents[2]) not in text  # no source lines of the machine that exported
    batch = [i.type.tensor_type.shape.dim[0].dim_param for i in (*model.graph.input, *model.graph.output)]
    assert len(set(batch)) == 1
    assert batch[0]


def test_nan_in_the_features_is_an_error_and_not_a_choice(tiny_llava: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_model(ExportRequest(str(tiny_llava), "4", out=bundle, rank=4, input="float32"))
    vlm = load(bundle)
    poisoned = np.full((1, 3, 42, 42), np.nan, np.float32)
    with pytest.raises(NumericalError, match="NaN"):
        vlm.vision.encode(poisoned)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "original", "keep": "40%"},
        {"precision": "fp16"},
        {"decoder_precision": "int4"},
        {"select": "none"},
        {"variance": 0.9, "rank": None},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_the_bundle_replays_its_golden_case(tiny_llava: Path, tmp_path: Path, options: dict[str, object]) -> None:
    out = tmp_path / "bundle"
    request = ExportRequest(**{"model": str(tiny_llava), "keep": "4", "rank": 4, "out": out, **options})  # type: ignore[arg-type]
    stages: list[str] = []
    summary = export_model(request, lambda stage, share: stages.append(stage))
    assert summary.bundle == out
    assert (summary.tokens, summary.keep) == (9, 9 if options.get("select") == "none" else 4)
    assert summary.sizes["bundle"] > summary.sizes["vision"] > 0
    assert stages[-1] == "done"
    if options.get("decoder_precision") == "int4":  # random weights are the worst case of int4: the answer may differ
        load(out)
        return
    report = verify(out)
    assert report.passed, report


def test_a_full_disk_in_mid_export_leaves_nothing(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter, "export_decoder", full)
    with pytest.raises(UserError, match="is full and the bundle was not written"):
        export_model(ExportRequest(str(tiny_llava), "4", rank=4, out=tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_mid_export_leaves_nothing(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "write_golden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(ExportRequest(str(tiny_llava), "4", rank=4, out=tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_for_a_jetson_holds_the_step_that_is_left(tiny_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_model(ExportRequest(str(tiny_llava), "4", rank=4, target="jetson-orin", cache=200, out=out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert "build.sh" in manifest["files"]
    assert "JetPack 6.2" in manifest["decoder"]["engine_refused"]  # the oldest release lacks the operators
    assert manifest["decoder"]["engine"]["cache"] == 200  # the others have them
    script = (out / "build.sh").read_text()
    assert "# Target jetson-orin" in script
    assert "inputs_embeds:1x200x48" in script


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("vision.onnx", ("the vision graph cannot become an engine on jetson-orin", "for TensorRT 10.3 (JetPack 6.2)")),
        ("engine.onnx", ("the decoder graph for engines cannot", "for TensorRT 10.16 (JetPack 7.2)")),
    ],
)
def test_a_graph_that_a_release_refuses_is_not_shipped(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, words: tuple[str, ...]
) -> None:
    spoilt = onnx.helper.make_node("Unique", ["x"], ["y"], name="odd")

    def spoil(place: Path) -> None:
        model = onnx.load(place, load_external_data=False)
        model.graph.node.append(spoilt)
        onnx.save(model, place)

    def check(place: Path, *arguments: object) -> dict[str, list[Violation]]:
        if place.name == part:
            spoil(place)
        return check_target(place, *arguments)  # type: ignore[arg-type]

    for module in (exporter, vision_file):
        monkeypatch.setattr(module, "check_target", check)
    with pytest.raises(UserError) as caught:
        export_model(ExportRequest(str(tiny_llava), "4", rank=4, target="jetson-orin", cache=200, out=tmp_path / "b"))
    for said in (*words, "node 'odd' (Unique) breaks the rule data-dependent", "--select leverage"):
        assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("0", "keep 1 or more"),
        ("-3", "keep 1 or more"),
        ("10", "has 9"),
        ("many", "a count such as 32"),
        ("150%", "up to 100%"),
        ("0%", "above 0%"),
    ],
)
def test_counts_that_cannot_be_kept_are_refused_before_any_work(
    tiny_llava: Path, tmp_path: Path, keep: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export_model(ExportRequest(str(tiny_llava), keep, out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_whose_weights_are_damaged_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in tiny_llava.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if n.endswith("position_embedding.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="its weights are damaged"):
        export_model(ExportRequest(str(copy), "4", rank=4, out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_the_manifest_says_how_it_was_made(tiny_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_model(ExportRequest(str(tiny_llava), "4", rank=4, seed=7, out=out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["vision"]["selector"] | {"iterations": 0, "block": 0} == {
        "name": "leverage-grid",
        "rank": 4,
        "variance": None,
        "block": 0,
        "iterations": 0,
        "centre": False,
        "start": "seeded",
        "seed": 7,
    }
    assert manifest["model"]["sha256"] == Checkpoint(tiny_llava).fingerprint()
    assert manifest["written_by"]["torch"] == torch.__version__
    assert (manifest["decoder"]["engine"], manifest["decoder"]["engine_refused"]) == (None, None)  # no engine on a CPU
