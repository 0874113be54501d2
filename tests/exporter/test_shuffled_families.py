"""SmolVLM, Idefics3 and InternVL: tiles, towers and what is refused, held to transformers' own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.towers.idefics3 import position_ids
from svdprune.runtime.errors import UserError
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.tiling.sequence import kept_marks
from tests.exporter import shuffled_models
from tests.exporter.shuffled_models import SAVES, SIDE, TOKENS
from tests.exporter.tiled_checks import picture, tiling

SIZES = [(640, 480), (60, 60), (200, 70), (33, 190), (24, 24), (7, 5), (900, 1)]  # width, height


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by its family's name, made once."""

    @functools.cache
    def saved(kind: str) -> Path:
        return SAVES[kind](tmp_path_factory.mktemp(kind))

    return saved


@pytest.mark.parametrize("name", list(SAVES))
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_tiles_are_those_of_the_processor(name: str, folders: Callable[[str], Path], size: tuple[int, int]) -> None:
    folder = folders(name)
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
    ids=lambda value: value.__name__ if callable(value) else str(value),
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


def test_internvl_in_its_own_form_is_refused_with_what_to_take() -> None:
    with pytest.raises(UserError, match="checkpoint whose name ends in -hf"):
        family_of({"model_type": "internvl_chat", "vision_config": {}}, "OpenGVLab/InternVL3-1B")


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
