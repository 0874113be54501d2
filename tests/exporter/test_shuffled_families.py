"""SmolVLM, Idefics3 and InternVL: tiles, pixel shuffle, marks, selection and answers, held to transformers' own."""

from __future__ import annotations

import dataclasses
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
from transformers import AutoModelForImageTextToText
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
from svdprune.runtime.cli.app import main
from svdprune.runtime.engines import build as build_module
from svdprune.runtime.engines.build import BuildRequest, build_engines
from svdprune.runtime.engines.store import list_engines
from svdprune.runtime.errors import UserError
from svdprune.runtime.picture import kept_views
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from tests.exporter import shuffled_models
from tests.exporter.shuffled_models import SIDE, TOKENS, inputs_of
from tests.exporter.test_tiled_families import picture, replace_vision, tiling

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


def picture_rows(vlm: Any, model: Any, folder: Path, image: Any) -> torch.Tensor:
    """The picture's rows among transformers', after the ids around them were found to be the bundle's."""
    ours = vlm.prompt_ids(QUESTION)
    prompt = vlm.text.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}])
    theirs, rows = unpruned(model, folder, image, prompt)
    place = ours.index(vlm.manifest.processor.image_token_id)
    after = len(ours) - place - 1
    total = len(theirs) - len(ours) + 1
    if vlm.manifest.processor.placeholder is None:  # the marks around the picture are rows of it
        assert theirs[:place] + theirs[len(theirs) - after :] == ours[:place] + ours[place + 1 :]
    else:
        kept = [token for token in theirs if token != ours[place]]
        assert kept == ours[:place] + ours[place + 1 :]
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
        prompt = vlm.text.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}])
    if vlm.manifest.processor.placeholder is not None:  # the tokens around it are of the text
        wanted = wanted[1 : 1 + sight.total]
    assert sight.total == len(sight.features) == len(wanted)
    np.testing.assert_allclose(sight.features, wanted.numpy(), atol=2e-4)
    if size == SIZES[0]:
        inputs = inputs_of(folder, prompt, image)
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.token_ids == made.tolist()
