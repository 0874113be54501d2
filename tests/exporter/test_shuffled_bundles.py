"""Bundles of SmolVLM and InternVL: prompts, selection, answers and engines, held to transformers' own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.families.base import Budget
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
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
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from tests.exporter import shuffled_models
from tests.exporter.compile_gate import assert_passes
from tests.exporter.shuffled_models import SAVES, TOKENS, inputs_of
from tests.exporter.tiled_checks import picture, replace_vision, tiling

SIZES = [(640, 480), (60, 60), (200, 70), (33, 190)]  # width, height
QUESTION = "What is in the picture?"
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


@pytest.mark.parametrize("size", [(200, 70), (24, 24)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_one_svd_over_the_whole_picture_does_not_see_the_padding(
    bundles: Bundles, folder: Path, model: Any, size: tuple[int, int]
) -> None:
    """The choice is that of a selector that is given this picture's tokens and nothing else."""
    image = picture(size)
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
    np.testing.assert_allclose(sight.scores, scores.numpy(), atol=2e-4)
    np.testing.assert_array_equal(sight.kept_indices, keep_indices(scores.numpy(), min(12, len(rows))))


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


@pytest.mark.parametrize("options", [{}, {"keep": 4, "budget": "tile"}], ids=str)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SAVES))
@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_the_sizes_of_the_published_models_build(kind: str, tmp_path: Path, budget: Budget) -> None:
    """SmolVLM2-2.2B: 17 tiles of 384 and 1,377 tokens; InternVL3-1B: 13 of 448 and 3,328. Two layers of each."""
    checkpoint = Checkpoint(shuffled_models.save_vision(tmp_path, kind))
    family = family_of(checkpoint.config, "big")
    spec = dataclasses.replace(family.describe(checkpoint), budget=budget)
    assert spec.tokens == {"smolvlm": (1377, 81), "internvl": (3328, 256)}[kind][budget == "tile"]
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 64, precision="fp16", gpu=True), graph)
    assert_passes(graph, spec)
