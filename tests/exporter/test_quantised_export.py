"""A tiny checkpoint to a bundle with an 8-bit vision graph: what is quantised, what it says, what is refused."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from svdprune.exporter import export as exporter
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, ExportSummary, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.quantise import agreement, plan
from svdprune.runtime import load
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import QuantisationInfo
from svdprune.runtime.preprocess import ImageSettings
from svdprune.runtime.targets import find_target
from svdprune.runtime.tiling.feed import Prepared
from svdprune.runtime.verify import verify

LAYERS = ["encoder.layers.0", "encoder.layers.1"]  # of three, the tap is after the last but one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty noisy pictures and a broken one."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(20):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((42, 42), Image.Resampling.BILINEAR).save(place / f"{number}.png")
    (place / "broken.png").write_bytes(b"no picture")
    return place


def request(tiny_llava: Path, folder: Path, out: Path, precision: str, target: str, **options: object) -> ExportRequest:
    """Few kept tokens by a small scorer: it is the encoder that is looked at."""
    given = {"select": "norm", "calibration_images": str(folder), **options}
    return ExportRequest(str(tiny_llava), "4", target, out, precision=precision, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tiny_llava: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportSummary]:
    """A bundle of each precision, for targets that run it."""
    place = tmp_path_factory.mktemp("bundles")
    asked = {
        "int8": request(tiny_llava, folder, place / "int8", "int8", "cpu"),
        "int8 for a GPU": request(tiny_llava, folder, place / "int8-gpu", "int8", "jetson-orin", sensitive="1"),
        "fp8": request(tiny_llava, folder, place / "fp8", "fp8", "rtx-40", sensitive="none"),
    }
    return {name: export_model(one) for name, one in asked.items()}


def graph_of(summary: ExportSummary) -> onnx.ModelProto:
    return onnx.load(summary.bundle / "vision.onnx")


def quantised_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that read a dequantised value."""
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [node.name for node in model.graph.node if dequantised.intersection(node.input)]


@pytest.mark.parametrize("name", ["int8", "int8 for a GPU", "fp8"])
def test_the_bundle_holds_and_answers(exported: dict[str, ExportSummary], name: str) -> None:
    report = verify(exported[name].bundle)
    assert report.passed, report
    vision = load(exported[name].bundle).manifest.vision
    assert vision.precision == name.partition(" ")[0] and vision.quantisation == exported[name].quantisation


@pytest.mark.parametrize("name", ["int8", "int8 for a GPU", "fp8"])
def test_only_the_encoder_is_quantised(exported: dict[str, ExportSummary], name: str) -> None:
    nodes = quantised_nodes(graph_of(exported[name]))
    assert nodes and all(node.startswith(("encoder.layers.", "embeddings.patch_embedding/")) for node in nodes)
    assert not any("/matmul" in node for node in nodes)  # products of two activations
    info = exported[name].quantisation
    assert info is not None
    for block in info.float_blocks:
        assert not any(node.startswith(f"{block}.") for node in nodes)
    left = [block for block in LAYERS if block not in info.float_blocks]
    assert all(sum(node.startswith(f"{block}.") for node in nodes) == 6 for block in left)  # q, k, v, out, fc1, fc2


def test_what_the_report_says(exported: dict[str, ExportSummary]) -> None:
    info = exported["int8"].quantisation
    assert info is not None
    assert (info.float_type, info.blocks, info.calibrated_on, info.swept_on, info.pictures) == ("fp32", 3, 10, 5, 5)
    assert info.source == str(info.source) and info.ranges in ("mse", "max") and info.target_met is True
    assert {item.block for item in info.sensitivity} == {"embeddings.patch_embedding", *LAYERS}
    assert 0.99 < info.cosine < 1.0 and 0 <= info.worst_overlap <= info.overlap <= 1 and 0 < info.scores < 0.2
    assert 0 <= info.agreement <= 1 and info.questions == 5 and 0.3 < info.size_ratio < 0.9
    counted = exported["int8 for a GPU"].quantisation
    assert counted is not None and (len(counted.float_blocks), counted.target_met) == (1, None)
    assert counted.float_blocks == [counted.sensitivity[0].block] and counted.float_type == "fp16"
    none = exported["fp8"].quantisation
    assert none is not None and (none.float_blocks, none.sensitivity, none.target_met) == ([], [], None)
    assert none.blocks == 2  # 8-bit floats leave the picture's own convolution alone


def test_opset_and_types(exported: dict[str, ExportSummary]) -> None:
    for name, opset, kind in (
        ("int8", 18, onnx.TensorProto.FLOAT),
        ("int8 for a GPU", 19, onnx.TensorProto.FLOAT16),
        ("fp8", 19, onnx.TensorProto.FLOAT16),
    ):
        model = graph_of(exported[name])
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert load(exported[name].bundle).manifest.vision.opset == opset
        scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        assert {i.data_type for i in model.graph.initializer if i.name in scales} == {kind}
        assert model.ir_version <= 10 and model.producer_name == "svdprune" and not model.metadata_props


@pytest.mark.parametrize(("name", "capability"), [("int8 for a GPU", "SM86"), ("fp8", "SM89")])
def test_tensorrt_rtx_builds_it(exported: dict[str, ExportSummary], name: str, capability: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(exported[name].bundle / "vision.onnx")), parser.get_error(0)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", *[(1, 42, 42, 3)] * 3)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_a_large_graph_keeps_its_weights_beside_it(
    tiny_llava: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdprune.exporter.vision.EXTERNAL_ABOVE", 1000)
    monkeypatch.setattr("svdprune.exporter.quantise.vision.EXTERNAL_ABOVE", 1000)
    export_model(request(tiny_llava, folder, tmp_path / "b", "int8", "cpu", sensitive="none", input="float32"))
    assert sorted(place.name for place in (tmp_path / "b").glob("vision*")) == ["vision.onnx", "vision.onnx.data"]
    assert verify(tmp_path / "b").passed
    assert not list((tmp_path / "b").glob(".*"))  # nor the folder in which it was made


def test_first_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"plain": {"a": 1, "b": 2}, "ours": {"a": 1, "b": 3}}
    monkeypatch.setattr(agreement.Asker, "first_token", lambda self, question, picture, seen: answers[seen][question])
    asker = agreement.Asker(None, None, None, "compact")  # type: ignore[arg-type]
    asked = [(Prepared({}), "a"), (Prepared({}), "b")]
    share = agreement.first_token_agreement(asker, asked, ["plain"] * 2, ["ours"] * 2)  # type: ignore[list-item]
    assert share == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp16", "sensitive": None}, "--calibration-images belongs to --precision int8 or fp8"),
        ({"precision": "fp32", "sensitive": "1", "calibration_images": None}, "--sensitive belongs to"),
        ({"sensitive": "some"}, "give auto, none"),
        ({"sensitive": "-1"}, "give auto, none"),
        ({"calibration_images": "nowhere"}, "nowhere"),
        ({"precision": "fp8", "target": "jetson-orin"}, "FP8 tensor cores appear with sm 89"),
        ({"precision": "fp8"}, "cpu cannot run fp8"),
    ],
)
def test_refused_before_any_work(
    tiny_llava: Path, folder: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    given = {"precision": "int8", "target": "cpu", **options}
    with pytest.raises(UserError, match=said):
        export_model(request(tiny_llava, folder, tmp_path / "b", **given))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_too_few_pictures(tiny_llava: Path, folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("0.png", "1.png", "broken.png"):
        (few / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="3 pictures and 12 are needed"):
        export_model(request(tiny_llava, few, tmp_path / "b", "int8", "cpu"))


def test_as_many_blocks_as_there_are_leave_nothing(tiny_llava: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sensitive 3 leaves nothing to quantise: the vision encoder has 3 blocks"):
        export_model(request(tiny_llava, folder, tmp_path / "b", "int8", "cpu", sensitive="3"))
    assert not list(tmp_path.iterdir())


def test_the_pictures_are_shared_out(tiny_llava: Path, folder: Path) -> None:
    notes: list[str] = []
    checkpoint = Checkpoint(tiny_llava)
    spec = family_of(checkpoint.config, "tiny").describe(checkpoint)
    settings = ImageSettings.from_json(SETTINGS)
    made = plan.plan_quantisation("int8", find_target("cpu"), str(folder), None, settings, spec, True, 0, notes.append)
    assert made is not None and (len(made.calibration), len(made.swept), len(made.held_out)) == (10, 5, 5)
    fed = [one.inputs["pixels"] for one in (*made.calibration, *made.swept, *(one for one, _ in made.held_out))]
    assert all(pixels.shape == (1, 42, 42, 3) and pixels.dtype == np.uint8 for pixels in fed)
    assert any("broken.png" in note for note in notes)
    assert len({pixels.tobytes() for pixels in fed}) == 20
    drawn = plan.plan_quantisation("fp8", find_target("h100"), None, "2", settings, spec, False, 0)
    assert drawn is not None and drawn.source == plan.SOURCE and drawn.float_type == "fp16" and not drawn.for_cpu
    assert (len(drawn.calibration), len(drawn.swept), len(drawn.held_out)) == (80, 16, 32)
    assert len({question for _, question in drawn.held_out}) > 5


SETTINGS = {
    "resize": {"shortest_edge": 42},
    "crop": {"height": 42, "width": 42},
    "resample": 3,
    "rescale": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}

INFO = QuantisationInfo(
    "fp16", "max", "photos", 80, 16, 32, 32, 24, ["encoder.layers.22"], True, 0.999, 0.97, 0.9, 0.01, 0.9375, 0.51
)


def test_export_and_inspect_say_what_it_changed(monkeypatch: pytest.MonkeyPatch, exported, tmp_path: Path) -> None:
    seen = []

    def export_model(asked: ExportRequest, *speakers: object) -> ExportSummary:
        seen.append(asked)
        info = dataclasses.replace(INFO, target_met=False)
        return ExportSummary(tmp_path / "b", 576, 32, {"bundle": 1}, {}, quantisation=info)

    monkeypatch.setattr(exporter, "export_model", export_model)
    words = "export x --keep 32 --target rtx-40 --precision fp8 --calibration-images photos --sensitive 3"
    result = CliRunner().invoke(group, shlex.split(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (seen[0].precision, seen[0].calibration_images, seen[0].sensitive) == ("fp8", "photos", "3")
    for word in ("80 pictures of photos", "1 of 24 blocks in fp16: encoder.layers.22", "not reached", "97.0%", "93.8%"):
        assert word in result.stdout
    inspected = CliRunner().invoke(group, ["inspect", str(exported["int8"].bundle)], catch_exceptions=False)
    assert "blocks in fp32" in inspected.stdout and "other pictures" in inspected.stdout
