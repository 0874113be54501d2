"""SmolVLM, Idefics3 and InternVL: tiles, pixel shuffle, marks, selection and answers, held to transformers' own."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.families.base import Budget
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.exporter.towers.idefics3 import position_ids
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.engines import build as build_module
from svdprune.runtime.engines.build import BuildRequest, build_engines
from svdprune.runtime.engines.store import list_engines
from svdprune.runtime.errors import UserError
from svdprune.runtime.picture import kept_views
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.text import user_message
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.tiling.sequence import kept_marks
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from tests.exporter import shuffled_models
from tests.exporter.shuffled_models import SIDE, TOKENS, inputs_of
from tests.exporter.test_tiled_families import assert_builds, picture, replace_vision, tiling

SIZES = [(640, 480), (60, 60), (200, 70), (33, 190), (24, 24), (7, 5), (900, 1)]  # width, height
SAVES: dict[str, Callable[..., Path]] = {
    "smolvlm": shuffled_models.save_smolvlm,
    "internvl": shuffled_models.save_internvl,
}
QUESTION = "What is in the picture?"
Bundles = Callable[..., Path]


@pytest.fixture(scope="module", params=list(SAVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by its family's name, made once."""

    @functools.cache
    def saved(kind: str) -> Path:
        return SAVES[kind](tmp_path_factory.mktemp(kind))

    return saved


@pytest.fixture(scope="module")
def folder(name: str, folders: Callable[[str], Path]) -> Path:
    return folders(name)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def bundles(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles by their options: the first is exported, the others have another vision graph in a copy of it."""
    made: dict[str, Path] = {}

    def bundle(keep: int = 12, budget: Budget = "picture", **options: Any) -> Path:
        key = f"{keep} {budget} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            if (keep, budget, options) == (12, "picture", {}):
                export_model(ExportRequest(str(folder), "12", rank=4, out=made[key], report=False))
            else:
                shutil.copytree(bundle(), made[key])
                replace_vision(folder, made[key], keep, budget, **options)
        return made[key]

    return bundle


@torch.no_grad()
def unpruned(model: Any, folder: Path, image: Any, prompt: str) -> tuple[list[int], torch.Tensor]:
    """The ids of a prompt and its rows (n, H), by transformers from the text and the file on."""
    inputs = inputs_of(folder, prompt, image)
    given = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask") if k in inputs}
    features = model.model.get_image_features(**given).pooler_output
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
    ids = inputs["input_ids"][0]
    rows: torch.Tensor = model.get_input_embeddings()(ids).clone()
    rows[ids == model.config.image_token_id] = features
    return ids.tolist(), rows


def rendered(vlm: Any) -> str:
    return str(vlm.text.render([user_message(QUESTION, True)]))


def picture_rows(vlm: Any, model: Any, folder: Path, image: Any) -> torch.Tensor:
    """The picture's rows among transformers', after the ids around them were found to be the bundle's."""
    ours = vlm.prompt_ids(QUESTION)
    theirs, rows = unpruned(model, folder, image, rendered(vlm))
    place = ours.index(vlm.manifest.processor.image_token_id)
    after = len(ours) - place - 1
    total = len(theirs) - len(ours) + 1
    assert theirs[:place] + theirs[len(theirs) - after :] == ours[:place] + ours[place + 1 :]
    return rows[place : place + total]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_tiles_are_those_of_the_processor(name: str, folder: Path, size: tuple[int, int]) -> None:
    cutter, spec = tiling(folder)
    image = picture(size)
    images = shuffled_models.IMAGES[name].from_pretrained(folder)
    resample = int(images.resample)
    cut = cutter.cut(image, resample)
    crop = {"crop_to_patches": True} if name == "internvl" else {}
    made = images(image, return_tensors="np", do_rescale=False, do_normalize=False, **crop)
    wanted = made["pixel_values"].reshape(-1, 3, SIDE, SIDE)
    np.testing.assert_array_equal(cut.pixels.transpose(0, 3, 1, 2), wanted)
    assert made.get("pixel_attention_mask", np.ones(1)).all()  # nothing is padded
    assert cutter.limits[0] <= len(cut.pixels) <= cutter.limits[2]
    assert len(cut.places) == len(cut.pixels) * TOKENS <= spec.tokens
    assert len(cut.marks) <= cutter.marks_with(len(cut.places))
    np.testing.assert_array_equal(np.sort(np.concatenate([cut.places, cut.marks[:, 0]])), np.arange(cut.total))


@pytest.mark.parametrize(
    ("longest", "tile", "split"), [(96, 24, True), (75, 25, True), (40, 42, True), (72, 24, False), (5000, 700, True)]
)
def test_tiles_of_idefics3_for_other_settings(longest: int, tile: int, split: bool) -> None:
    processor = shuffled_models.IMAGES["idefics3"](
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, do_image_splitting=split
    )
    sides = range(-(-(longest + longest % 2) // tile))
    cells = [[[1, 2] for _ in sides] for _ in sides]
    ids = {"cells": cells, "line": [3], "whole": [4, 1, 5], "alone": [1, 5], "end": [1]}
    cutter = tiling_of({"kind": "idefics3", "tile": tile, "side": 3, "longest": longest, "split": split, **ids})
    for size in [(640, 480), (90, 91), (41, 43), (1, 300)] if longest < 1000 else [(1, 300)]:
        image = picture(size)
        cut = cutter.cut(image, int(processor.resample))
        wanted = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
        np.testing.assert_array_equal(cut.pixels.transpose(0, 3, 1, 2), wanted)
        assert cutter.limits[0] <= len(cut.pixels) <= cutter.limits[2]


@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 5), (3, 3)])
def test_tiles_of_internvl_for_other_settings(least: int, most: int) -> None:
    processor = shuffled_models.IMAGES["internvl"](
        size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=least, max_patches=most
    )
    cutter = tiling_of({"kind": "internvl", "tile": 24, "side": 3, "least": least, "most": most})
    for size in [(640, 480), (60, 60), (30, 200), (24, 24), (300, 7)]:
        image = picture(size)
        cut = cutter.cut(image, int(processor.resample))
        wanted = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"]
        np.testing.assert_array_equal(cut.pixels.transpose(0, 3, 1, 2), wanted)
        assert cutter.limits[0] <= len(cut.pixels) <= cutter.limits[2]


@pytest.mark.parametrize(("side", "trained"), [(6, 6), (27, 27), (32, 32), (26, 26), (4, 6), (9, 6), (30, 27)])
def test_positions_are_those_of_the_tower(side: int, trained: int) -> None:
    """Identity for a tile of the trained size, whatever the rounding of its boundaries."""
    config = SmolVLMVisionConfig(hidden_size=8, image_size=2 * trained, patch_size=2)
    embeddings = SmolVLMVisionEmbeddings(config)
    ids = position_ids(side, trained)
    with torch.no_grad():
        pixels = torch.zeros(1, 3, 2 * side, 2 * side)
        placed = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
        bare = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        np.testing.assert_allclose(placed - bare, embeddings.position_embedding(ids)[None], atol=1e-6)
    if side == trained:
        np.testing.assert_array_equal(ids, np.arange(side**2))


@pytest.mark.parametrize(
    ("save", "options"),
    [
        (shuffled_models.save_idefics3, {}),
        (shuffled_models.save_internvl, {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True}),
        (shuffled_models.save_internvl, {"use_mean_pooling": False}),
        (shuffled_models.save_internvl, {"use_mean_pooling": False, "tap": -2}),
        (shuffled_models.save_internvl, {"use_absolute_position_embeddings": False}),
    ],
    ids=str,
)
def test_the_tower_is_that_of_transformers(save: Callable[..., Path], options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, **options))
    family = family_of(checkpoint.config, "tiny")
    spec = family.describe(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, attention = family.encoder(checkpoint)(pixels)
        wanted, attended = family.reference_tokens(model.eval(), pixels)
        np.testing.assert_allclose(tokens, wanted, atol=1e-4)
        if attended is None:
            assert attention is None
        else:
            np.testing.assert_allclose(attention, attended, atol=1e-5)
        projected = family.projector(checkpoint)(tokens)
        np.testing.assert_allclose(projected, family.reference_project(model, wanted), atol=1e-4)
    assert tuple(tokens.shape) == (2, TOKENS, spec.channels)
    assert projected.shape[2] == spec.hidden


def test_a_tile_of_another_size_takes_its_positions_from_the_trained_ones(tmp_path: Path) -> None:
    folder = shuffled_models.save_smolvlm(tmp_path)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["max_image_size"] = {"longest_edge": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 16}))
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    assert family.describe(checkpoint).grid == (4, 4)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, _ = family.reference_tokens(model.eval(), pixels)
        np.testing.assert_allclose(family.encoder(checkpoint)(pixels)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("size", SIZES[:4], ids=lambda s: f"{s[0]}x{s[1]}")
def test_all_tokens_kept_are_the_rows_of_transformers(
    folder: Path, model: Any, bundles: Bundles, size: tuple[int, int]
) -> None:
    """Prompt, pixels, tower, pixel shuffle, projector and marks at once; then the answer of `generate`."""
    image, new = picture(size), 8
    with load(bundles(0, name="none")) as vlm:
        sight = vlm.see(image)
        wanted = picture_rows(vlm, model, folder, image)
        answer = vlm.ask(sight, QUESTION, max_new_tokens=new)
        prompt = rendered(vlm)
    assert sight.total == len(sight.features) == len(wanted)
    np.testing.assert_allclose(sight.features, wanted.numpy(), atol=2e-4)
    if size == SIZES[0]:
        inputs = inputs_of(folder, prompt, image)
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.token_ids == made.tolist()


def test_two_pictures_in_one_prompt(folder: Path, model: Any, bundles: Bundles) -> None:
    images, new = [picture((200, 70)), picture((60, 60))], 8
    with load(bundles(0, name="none")) as vlm:
        answer = vlm.ask(images, QUESTION, max_new_tokens=new)
        prompt = str(vlm.text.render([user_message(QUESTION, 2)]))
    inputs = inputs_of(folder, prompt, *images)
    made = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.token_ids == made.tolist()


def test_one_svd_over_the_whole_picture_does_not_see_the_padding(bundles: Bundles, folder: Path, model: Any) -> None:
    """The choice is that of a selector that is given this picture's tokens and nothing else."""
    image = picture((200, 70))
    with load(bundles()) as vlm:
        sight, images = vlm.see(image), vlm.settings
    checkpoint = Checkpoint(folder)
    cutter, spec = tiling(folder)
    cut = cutter.cut(image, images.resample)
    with torch.no_grad():
        pixels = torch.from_numpy(normalise(cut.pixels, images))
        tokens, _ = family_of(checkpoint.config, "tiny").reference_tokens(model, pixels)
        rows = tokens.flatten(0, 1)
        scores = build_selector(SelectorConfig(rank=4), tokens=len(rows), channels=spec.channels)(rows[None])[0]
    assert len(sight.scores) < spec.tokens
    np.testing.assert_allclose(sight.scores, scores.numpy(), atol=2e-4)
    np.testing.assert_array_equal(sight.kept_indices, keep_indices(scores.numpy(), 12))


@pytest.mark.parametrize(("budget", "positions"), [("picture", "original"), ("tile", "compact")])
def test_answers_are_those_of_transformers_given_the_kept_tokens(
    folder: Path, model: Any, bundles: Bundles, positions: str, budget: str
) -> None:
    image, new = picture((640, 480)), 8
    with load(bundles(12 if budget == "picture" else 4, budget), positions=positions) as vlm:
        sight = vlm.see(image)
        answer = vlm.ask(sight, QUESTION, max_new_tokens=new)
        ids, image_token = vlm.prompt_ids(QUESTION), vlm.manifest.processor.image_token_id
        rows = picture_rows(vlm, model, folder, image)[sight.places]
    kept = set(sight.kept_indices.tolist())
    assert len(kept) == (12 if budget == "picture" else 4 * len(np.unique(np.arange(len(sight.scores)) // TOKENS)))
    np.testing.assert_allclose(sight.features, rows, atol=2e-4)
    place = ids.index(image_token)
    prompt = torch.tensor([[*ids[:place], *[image_token] * len(rows), *ids[place + 1 :]]])
    spots = np.arange(len(rows)) if positions == "compact" else sight.places
    after = len(rows) if positions == "compact" else sight.total
    where = [*range(place), *(place + spots), *(place + after + np.arange(len(ids) - place - 1))]
    outputs = {"image": BaseModelOutputWithPooling(pooler_output=rows[None])}
    if positions == "compact":  # the whole of transformers: placeholders, merging, generation
        made = model.generate(input_ids=prompt, mm_encoder_outputs=outputs, max_new_tokens=new, do_sample=False)
        assert answer.token_ids == made[0, prompt.shape[1] :].tolist()
        return
    wanted: list[int] = []
    position = torch.tensor([where])
    while len(wanted) < new and wanted[-1:] != [2]:
        with torch.no_grad():
            out = model(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                position_ids=position,
                mm_encoder_outputs=dict(outputs),
                use_cache=False,
            )
        wanted.append(int(out.logits[0, -1].argmax()))
        prompt = torch.cat([prompt, torch.tensor([[wanted[-1]]])], 1)
        position = torch.cat([position, position[:, -1:] + 1], 1)
    assert answer.token_ids == wanted


def test_a_tile_without_kept_tokens_loses_what_stands_before_it(folders: Callable[[str], Path]) -> None:
    folder = folders("smolvlm")
    cutter, _ = tiling(folder)
    cut = cutter.cut(picture((640, 480)), 1)  # 3 x 3 tiles and one more
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def text(tiles: list[int]) -> str:
        """The marks that stay where these tiles keep a token, with one `.` for it."""
        places = np.array([cut.places[tile * TOKENS + 1] for tile in tiles])
        marks = kept_marks(cut.marks, places)
        ids = [*marks[:, 1].tolist(), *[-1] * len(places)]
        order = np.argsort(np.concatenate([marks[:, 0], places]))
        return "".join("." if ids[i] < 0 else tokenizer.decode([ids[i]]) for i in order)

    fake, whole = shuffled_models.FAKE, shuffled_models.WHOLE
    line, last = "\n", "\n\n"
    assert text([0, 4, 9]) == f"{fake}<row_1_col_1>.{line}{fake}<row_2_col_2>.{line}{last}{fake}{whole}.{fake}"
    assert text([9]) == f"{last}{fake}{whole}.{fake}"
    assert text([3, 5]) == f"{fake}<row_2_col_1>.{fake}<row_2_col_3>.{line}{fake}"


def test_the_bundle_replays_its_golden_case_and_answers_on_the_command_line(
    bundles: Bundles, name: str, tmp_path: Path
) -> None:
    report = verify(bundles())
    assert report.passed, report
    tiles = open_bundle(bundles()).manifest.vision.tiles
    assert tiles is not None and (tiles.least, tiles.most) == {"smolvlm": (4, 10), "internvl": (1, 5)}[name]
    photo = str(tmp_path / "picture.png")
    picture((640, 480)).save(photo)
    for command in (
        ["run", str(bundles()), "--image", photo, "--prompt", QUESTION, "--picture", str(tmp_path / "kept.png")],
        ["verify", str(bundles())],
        ["inspect", str(bundles())],
    ):
        result = CliRunner().invoke(group, command)
        assert result.exit_code == 0, result.output


def test_the_picture_is_drawn_whole_not_tile_by_tile(bundles: Bundles) -> None:
    with load(bundles()) as vlm:
        sight = vlm.see(picture((640, 480)))
    assert sight.tiled is not None
    large, small = sight.tiled.views
    assert sum(view.grid[0] * view.grid[1] for view in (large, small)) == len(sight.scores)
    scores, kept = large.part(np.arange(len(sight.scores)), np.array([0, 1, TOKENS]))
    side = round(TOKENS**0.5)
    np.testing.assert_array_equal(scores[: 2 * side], [0, 1, 2, *range(TOKENS, TOKENS + side)][: 2 * side])
    np.testing.assert_array_equal(kept, [0, 1, side])
    assert min(kept_views(sight.tiled.views, sight.scores, sight.kept_indices, "what is kept").size) > 100


@pytest.mark.parametrize("options", [{}, {"keep": 4, "budget": "tile", "precision": "fp16"}], ids=str)
def test_the_graph_keeps_to_the_rules_of_every_release(bundles: Bundles, options: dict[str, Any]) -> None:
    graph = onnx.load(bundles(**options) / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert check_graph(graph, "11.4", TENSORRT_RTX) == []


def test_tensorrt_rtx_builds_the_graph(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(build_module, "local_gpu", lambda: None)
    report = build_engines(bundles(), BuildRequest(target="rtx-40", part="vision"))
    assert [result.part for result in report.parts] == ["vision"]
    (engine,) = list_engines(open_bundle(bundles()))
    assert engine.info["layers"] > 0


def test_cls_attention_of_joined_patches(bundles: Bundles, folder: Path, model: Any, name: str, tmp_path: Path) -> None:
    if name == "smolvlm":
        with pytest.raises(UserError, match=r"needs a \[CLS\] token"):
            export_model(ExportRequest(str(folder), "4", select="cls", out=tmp_path / "bundle"))
        return
    image = picture((200, 70))
    with load(bundles(12, name="cls")) as vlm:
        sight, images = vlm.see(image), vlm.settings
    cut = tiling(folder)[0].cut(image, images.resample)
    with torch.no_grad():
        pixels = torch.from_numpy(normalise(cut.pixels, images))
        _, attention = family_of(Checkpoint(folder).config, "tiny").reference_tokens(model, pixels)
    np.testing.assert_allclose(sight.scores, attention.flatten(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "language"),
    [
        (shuffled_models.save_idefics3, "llama"),
        (shuffled_models.save_internvl, "qwen3"),
        (shuffled_models.save_internvl, "llama"),
    ],
)
def test_a_whole_export_with_each_language_model(save: Callable[..., Path], language: str, tmp_path: Path) -> None:
    folder, bundle = save(tmp_path / "model", language), tmp_path / "bundle"
    export_model(ExportRequest(str(folder), "4", rank=4, budget="tile", positions="original", out=bundle))
    assert verify(bundle).passed
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with load(bundle) as vlm:
        sight = vlm.see(image := picture((640, 480)))
        np.testing.assert_allclose(sight.features, picture_rows(vlm, model, folder, image)[sight.places], atol=2e-4)


def changed(folder: Path, out: Path, file: str, **values: Any) -> Checkpoint:
    """A copy of a checkpoint with other values in a JSON file; None removes one."""
    for item in folder.iterdir():
        if item.name != file:
            (out / item.name).symlink_to(item)
    content = json.loads((folder / file).read_text())
    for key, value in values.items():
        content = content | {key: value}
        if value is None:
            del content[key]
    (out / file).write_text(json.dumps(content))
    return Checkpoint(out)


@pytest.mark.parametrize(
    ("kind", "file", "values", "said"),
    [
        ("smolvlm", "processor_config.json", {"image_seq_len": 8}, "gives a tile 8 tokens .* the model makes 9"),
        ("smolvlm", "config.json", {"scale_factor": 4}, "6 patches a side, which scale_factor 4 cannot join"),
        ("smolvlm", "preprocessor_config.json", {"do_resize": False}, "pictures would make tiles without limit"),
        ("smolvlm", "preprocessor_config.json", {"resample": None}, "does not say size.longest_edge and resample"),
        ("smolvlm", "config.json", {"vision_config": {"model_type": "siglip"}}, "'siglip' vision tower is not"),
        ("internvl", "processor_config.json", {"image_seq_length": 8}, "gives a tile 8 tokens .* the model makes 9"),
        ("internvl", "config.json", {"downsample_ratio": 0.4}, "downsample_ratio 0.4 does not join whole squares"),
        ("internvl", "config.json", {"downsample_ratio": 0.25}, "1/4 cannot join 6 patches a side"),
        ("internvl", "config.json", {"vision_feature_select_strategy": "full"}, "keeps .CLS. among the tokens"),
        ("internvl", "config.json", {"vision_feature_layer": [-1, -2]}, "takes features of several layers"),
        ("internvl", "config.json", {"vision_config": {"image_size": [24, 48]}}, "image_size .* is not square"),
        ("internvl", "preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "takes squares of 24"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    kind: str, file: str, values: dict[str, Any], said: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = changed(folders(kind), tmp_path, file, **values)
    with pytest.raises(UserError, match=said):
        family_of(checkpoint.config, "tiny").describe(checkpoint)


def test_a_processor_without_tiles_makes_one(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (plain := tmp_path / "internvl").mkdir()
    checkpoint = changed(folders("internvl"), plain, "preprocessor_config.json", max_patches=1)
    spec = family_of(checkpoint.config, "tiny").describe(checkpoint)
    assert (spec.tokens, spec.tiling) == (TOKENS, None)  # a picture like any other
    (marked := tmp_path / "smolvlm").mkdir()
    checkpoint = changed(folders("smolvlm"), marked, "preprocessor_config.json", do_image_splitting=False)
    spec = family_of(checkpoint.config, "tiny").describe(checkpoint)
    assert spec.tokens == TOKENS and spec.tiling is not None
    cut = tiling_of(spec.tiling).cut(picture((640, 480)), 1)
    assert (len(cut.pixels), cut.total) == (1, TOKENS + 3)  # two tokens before it, one after


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SAVES))
@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_the_sizes_of_the_published_models_build(kind: str, tmp_path: Path, budget: Budget) -> None:
    """SmolVLM2-2.2B: 17 tiles of 384 and 1,377 tokens; InternVL3-1B: 13 of 448 and 3,328. Two layers of each."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    checkpoint = Checkpoint(shuffled_models.save_vision(tmp_path, kind))
    family = family_of(checkpoint.config, "big")
    spec = dataclasses.replace(family.describe(checkpoint), budget=budget)
    assert spec.tokens == {"smolvlm": (1377, 81), "internvl": (3328, 256)}[kind][budget == "tile"]
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 64, precision="fp16"), graph)
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert_builds(trt, graph, spec)
