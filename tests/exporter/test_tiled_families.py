"""LLaVA-NeXT and LLaVA-OneVision: tiles, packing, selection and answers, held to transformers' own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from svdprune.exporter.build_script import vision_command
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.families.base import Budget
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.arrays import host_rows
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines import build as build_module
from svdprune.runtime.engines.build import BuildRequest, build_engines, profiles_of
from svdprune.runtime.engines.key import BuildOptions, batch_of
from svdprune.runtime.engines.store import list_engines
from svdprune.runtime.errors import UserError
from svdprune.runtime.picture import kept_views
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.profile.measure import Plan, profile
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.tiling.feed import prepare, rows_of
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.unpruned import unpruned_graph
from svdprune.runtime.verify import verify
from svdprune.runtime.verify_against import verify_against
from tests.exporter import tiled_models
from tests.exporter.compile_gate import assert_passes
from tests.exporter.tiled_checks import PROCESSORS, SAVES, SIZES, picture, replace_vision, tiling, unpruned

Bundles = Callable[..., Path]


@pytest.fixture(scope="module", params=list(SAVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVES[name](tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def bundles(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles by their options: the first is exported, the others have another vision graph in a copy of it."""
    made: dict[str, Path] = {}

    def exported() -> Path:
        if "whole" not in made:
            made["whole"] = tmp_path_factory.mktemp("bundles") / "bundle"
            export_model(ExportRequest(str(folder), "12", rank=4, out=made["whole"], report=False))
        return made["whole"]

    def bundle(keep: int = 12, budget: Budget = "picture", **options: Any) -> Path:
        if (keep, budget, options) == (12, "picture", {}):
            return exported()
        key = f"{keep} {budget} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            shutil.copytree(exported(), made[key])
            replace_vision(folder, made[key], keep, budget, **options)
        return made[key]

    return bundle


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_tiles_are_those_of_the_processor(name: str, folder: Path, size: tuple[int, int]) -> None:
    cutter, spec = tiling(folder)
    image = picture(size)
    cut = cutter.cut(image, 3)
    processor = PROCESSORS[name].from_pretrained(folder)
    wanted = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    np.testing.assert_array_equal(cut.pixels.transpose(0, 3, 1, 2), wanted)
    assert cutter.limits[0] <= len(cut.pixels) <= cutter.limits[2]
    assert len(cut.places) <= spec.tokens
    assert cut.sources.shape[1] == cutter.most_sources
    np.testing.assert_allclose(cut.weights.sum(1), 1, rtol=1e-6)
    rows = np.sort(np.concatenate([cut.places, cut.marks[:, 0]]))
    np.testing.assert_array_equal(rows, np.arange(cut.total))  # every row is a token or a mark, once


@pytest.mark.parametrize("budget", ["picture", "tile"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_all_tokens_kept_are_the_rows_of_transformers(
    name: str, folder: Path, model: Any, bundles: Bundles, size: tuple[int, int], budget: str
) -> None:
    """Pixels, tower, packing, newlines, unpadding and resampling at once: every token is kept, and so is every row."""
    image = picture(size)
    with load(bundles(0, budget, name="none")) as vlm:
        sight = vlm.see(image)
    wanted = unpruned(model, folder, name, image)
    if sight.total != len(sight.features):  # a picture so thin that the grid has newlines alone: they are not kept
        assert len(sight.kept_indices) == tiled_models.TOKENS
        wanted = wanted[: tiled_models.TOKENS]
    np.testing.assert_allclose(sight.features, wanted.numpy(), atol=2e-4)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_one_svd_over_the_whole_picture_does_not_see_the_padding(
    folder: Path, model: Any, bundles: Bundles, size: tuple[int, int]
) -> None:
    """The choice is that of a selector that is given this picture's tokens and nothing else."""
    keep = 12
    image = picture(size)
    with load(bundles(keep)) as vlm:
        sight = vlm.see(image)
        images = vlm.settings
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    cutter, spec = tiling(folder)
    cut = cutter.cut(image, 3)
    with torch.no_grad():
        tokens, _ = family.reference_tokens(model, torch.from_numpy(normalise(cut.pixels, images)))
        rows = (tokens.flatten(0, 1)[cut.sources] * torch.from_numpy(cut.weights)[..., None]).sum(1)
        scores = build_selector(SelectorConfig(rank=4), tokens=len(rows), channels=spec.channels)(rows[None])[0]
    count = min(keep, len(rows))
    assert len(sight.kept_indices) == count  # never more than the tokens present
    np.testing.assert_allclose(sight.scores, scores.numpy(), atol=2e-4)
    np.testing.assert_array_equal(sight.kept_indices, keep_indices(scores.numpy(), count))


def test_centring_leaves_the_padding_out(bundles: Bundles, folder: Path, model: Any) -> None:
    image = picture((200, 70))
    with load(bundles(12, centre=True)) as vlm:
        sight, images = vlm.see(image), vlm.settings
    checkpoint = Checkpoint(folder)
    cutter, spec = tiling(folder)
    cut = cutter.cut(image, 3)
    with torch.no_grad():
        tokens, _ = family_of(checkpoint.config, "tiny").reference_tokens(
            model, torch.from_numpy(normalise(cut.pixels, images))
        )
        rows = (tokens.flatten(0, 1)[cut.sources] * torch.from_numpy(cut.weights)[..., None]).sum(1)
        config = SelectorConfig(rank=4, centre=True)
        scores = build_selector(config, tokens=len(rows), channels=spec.channels)(rows[None])[0]
    np.testing.assert_allclose(sight.scores, scores.numpy(), atol=2e-4)


def test_a_budget_by_tile_keeps_as_many_of_each(bundles: Bundles, folder: Path) -> None:
    with load(bundles(4, "tile")) as vlm:
        sight = vlm.see(image := picture((640, 480)))
    cut = tiling(folder)[0].cut(image, 3)
    owners, present = np.bincount(cut.tile[sight.kept_indices]), np.bincount(cut.tile)
    np.testing.assert_array_equal(owners, np.minimum(present, 4))
    assert (np.diff(sight.places) > 0).all()


def test_a_newline_stays_with_a_kept_token_of_its_line(bundles: Bundles, folder: Path, model: Any) -> None:
    with load(bundles()) as vlm:
        sight = vlm.see(image := picture((640, 480)))
    cut = tiling(folder)[0].cut(image, 3)
    kept = set(cut.places[sight.kept_indices].tolist())
    wanted = {row for row, _, since in cut.marks.tolist() if kept & set(range(since, row))}
    assert set(sight.places.tolist()) == kept | wanted
    newline = model.model.image_newline.detach().numpy()
    for row, feature in zip(sight.places.tolist(), sight.features, strict=True):
        assert np.allclose(feature, newline) == (row in wanted)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_answers_are_those_of_transformers_given_the_kept_tokens(
    name: str, folder: Path, model: Any, bundles: Bundles, positions: str, budget: str
) -> None:
    image, question, new = picture((640, 480)), "What is in the picture?", 12
    with load(bundles(12 if budget == "picture" else 4, budget), positions=positions) as vlm:
        sight = vlm.see(image)
        answer = vlm.ask(sight, question, max_new_tokens=new)
        ids, image_token = vlm.prompt_ids(question), vlm.manifest.processor.image_token_id
    rows = unpruned(model, folder, name, image)[sight.places]
    place = ids.index(image_token)
    prompt = torch.tensor([[*ids[:place], *[image_token] * len(rows), *ids[place + 1 :]]])
    spots = np.arange(len(rows)) if positions == "compact" else sight.places
    after = len(rows) if positions == "compact" else sight.total
    where = [*range(place), *(place + spots), *(place + after + np.arange(len(ids) - place - 1))]
    with torch.no_grad():
        outputs = BaseModelOutputWithPooling(pooler_output=[rows])
        if positions == "compact":  # the whole of transformers: placeholders, merging, generation
            made = model.generate(
                input_ids=prompt, mm_encoder_outputs={"image": outputs}, max_new_tokens=new, do_sample=False
            )
            wanted = made[0, prompt.shape[1] :].tolist()
        else:
            wanted = []
            position = torch.tensor([where])
            for _ in range(new):
                out = model(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    position_ids=position,
                    mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[rows])},
                    use_cache=False,
                )
                wanted.append(int(out.logits[0, -1].argmax()))
                if wanted[-1] == 2:
                    break
                prompt = torch.cat([prompt, torch.tensor([[wanted[-1]]])], 1)
                position = torch.cat([position, position[:, -1:] + 1], 1)
    assert answer.token_ids == wanted


def test_the_bundle_replays_its_golden_case(bundles: Bundles) -> None:
    report = verify(bundles())
    assert report.passed, report
    tiles = open_bundle(bundles()).manifest.vision.tiles
    assert tiles is not None and (tiles.budget, tiles.marks) == ("picture", "processor/marks.npy")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_whole_export_by_tile_with_each_language_model(
    name: str, tmp_path: Path, language: str, positions: Any
) -> None:
    folder, bundle = tmp_path / "model", tmp_path / "bundle"
    SAVES[name](folder, language)
    export_model(ExportRequest(str(folder), "4", rank=4, budget="tile", positions=positions, out=bundle))
    assert verify(bundle).passed


def test_bytes_and_floats_and_half_precision_say_the_same(bundles: Bundles) -> None:
    image = picture((640, 480))
    sights = {}
    for options in ({}, {"input": "float32"}, {"precision": "fp16"}):
        with load(bundles(**options)) as vlm:
            sights[str(options)] = vlm.see(image)
    first, second, half = sights.values()
    np.testing.assert_array_equal(first.kept_indices, second.kept_indices)
    np.testing.assert_allclose(first.features, second.features, atol=1e-3)
    np.testing.assert_allclose(first.scores, half.scores, atol=0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 4, "budget": "tile"}, {"precision": "fp16"}, {"centre": True}, {"keep": 0, "name": "none"}],
    ids=str,
)
def test_the_graph_keeps_to_the_rules_of_every_release(bundles: Bundles, options: dict[str, Any]) -> None:
    graph = onnx.load(bundles(**options) / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert check_graph(graph, "11.4", TENSORRT_RTX) == []


@pytest.mark.parametrize("options", [{}, {"keep": 4, "budget": "tile"}, {"precision": "fp16"}], ids=str)
def test_tensorrt_rtx_builds_the_graph(
    bundles: Bundles, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(build_module, "local_gpu", lambda: None)
    report = build_engines(bundles(**options), BuildRequest(target="rtx-40", part="vision"))
    assert [result.part for result in report.parts] == ["vision"]
    (engine,) = list_engines(open_bundle(bundles(**options)))
    assert engine.info["layers"] > 0


@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_an_engine_is_for_the_tiles_of_one_picture(bundles: Bundles, budget: str) -> None:
    bundle = open_bundle(bundles(12 if budget == "picture" else 4, budget))
    vision = bundle.manifest.vision
    tiles = vision.tiles
    assert tiles is not None
    counts = (tiles.least, tiles.likely, tiles.most)
    varying = {"pixels": (-1, 42, 42, 3)}
    if budget == "tile":
        varying["sources"] = (-1, vision.tokens, tiles.sources)
    (profile,) = profiles_of(bundle, "vision", BuildOptions(), varying)
    assert {name: tuple(shape[0] for shape in shapes) for name, shapes in profile.items()} == dict.fromkeys(
        varying, counts
    )
    said = " ".join(vision_command(vision))
    assert f"--maxShapes=pixels:{tiles.most}x42x42x3" in said
    assert ("sources:" in said) == (budget == "tile")


def test_the_tiles_are_drawn(bundles: Bundles) -> None:
    with load(bundles()) as vlm:
        sight = vlm.see(picture((640, 480)))
    assert sight.tiled is not None
    assert sum(view.grid[0] * view.grid[1] for view in sight.tiled.views) == len(sight.scores)
    drawn = kept_views(sight.tiled.views, sight.scores, sight.kept_indices, "what is kept")
    assert min(drawn.size) > 100


@pytest.mark.parametrize("options", [{}, {"keep": 4, "budget": "tile"}], ids=str)
def test_backends_are_compared_and_profiled(bundles: Bundles, options: dict[str, Any]) -> None:
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    bundle = bundles(**options)
    if not options:  # a copy with another graph has the golden case of the first
        against = verify_against(bundle, "onnxruntime")
        assert against.passed, against
    report = profile(bundle, plan=Plan(runs=1, warm_up=0, new_tokens=2, layers=False))
    assert report.unpruned is not None
    with load(bundle) as vlm:
        sight = vlm.see(image := bundle / "golden" / "image.png")
        prepared = prepare(image, vlm.settings, vlm.manifest)
        text = len(vlm.prompt_ids(vlm.bundle.read_json("golden/case.json")["question"])) - 1
        session = ort.InferenceSession(unpruned_graph(bundle / "vision.onnx", bundle / "unpruned.onnx"))
        whole = rows_of(prepared, {"features": session.run(["features"], prepared.inputs)[0]}, vlm)
    (bundle / "unpruned.onnx").unlink()
    assert whole is not None
    assert (report.pruned.prompt, report.unpruned.prompt) == (text + len(sight.features), text + sight.total)
    np.testing.assert_array_equal(whole.span.kept, np.arange(sight.total))
    np.testing.assert_allclose(host_rows([whole.features])[sight.places], sight.features, atol=1e-4)


def test_a_bundle_of_tiles_is_encoded_one_picture_at_a_time(bundles: Bundles) -> None:
    with pytest.raises(UserError, match="takes the tiles of one picture"):
        batch_of(open_bundle(bundles()).manifest.vision, BuildOptions((1, 1, 4)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "10000"}, "keep 10000 tokens: the picture has"),
        ({"keep": "10", "budget": "tile"}, "keep 10 tokens: the picture has 9"),
        ({"select": "grid"}, "needs a picture of a fixed number of tokens"),
        ({"select": "leverage-grid"}, "needs a picture of a fixed number of tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(
    folder: Path, tmp_path: Path, options: dict[str, str], said: str
) -> None:
    request = ExportRequest(str(folder), **{"keep": "4", "rank": 4, "out": tmp_path / "bundle", **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        export_model(request)
    assert list(tmp_path.iterdir()) == []


def test_a_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["image_grid_pinpoints"] = [[42, 42]]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match="image_grid_pinpoints are not those"):
        family_of(checkpoint.config, "tiny").describe(checkpoint)


def test_a_plain_family_takes_no_budget_by_tile(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not cut pictures into tiles"):
        export_model(ExportRequest(str(tiny_llava), "4", rank=4, budget="tile", out=tmp_path / "bundle"))


def test_cls_attention_needs_a_cls_token(name: str, folder: Path, model: Any, bundles: Bundles, tmp_path: Path) -> None:
    if name == "onevision":
        request = ExportRequest(str(folder), "4", select="cls", out=tmp_path / "bundle")
        with pytest.raises(UserError, match=r"needs a \[CLS\] token"):
            export_model(request)
        return
    image = picture((640, 480))
    with load(bundles(12, name="cls")) as vlm:
        sight, images = vlm.see(image), vlm.settings
    checkpoint = Checkpoint(folder)
    cut = tiling(folder)[0].cut(image, 3)
    with torch.no_grad():
        _, attention = family_of(checkpoint.config, "tiny").reference_tokens(
            model, torch.from_numpy(normalise(cut.pixels, images))
        )
    np.testing.assert_allclose(sight.scores, attention.flatten()[cut.sources[:, 0]].numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_the_sizes_of_the_published_models_build(name: str, tmp_path: Path, budget: Budget) -> None:
    """CLIP-L at 336 with 2,880 candidates, SigLIP-so400m at 384 with 8,667 of four sources; two layers of each."""
    checkpoint = Checkpoint(tiled_models.save_vision(tmp_path, name))
    family = family_of(checkpoint.config, "big")
    spec = dataclasses.replace(family.describe(checkpoint), budget=budget)
    assert spec.tokens == {"next": (2880, 576), "onevision": (8667, 729)}[name][budget == "tile"]
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 64, precision="fp16", gpu=True), graph)
    assert_passes(graph, spec)
