"""Qwen2.5-VL and Qwen3-VL: pictures of any size in one graph, held to transformers' own pixels, rows and answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from svdprune.calib.evaluate.bundle import Unpruned
from svdprune.exporter.build_script import vision_command
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import VisionSpec, family_of
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.exporter.tiles import described
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.answer import Sight
from svdprune.runtime.errors import UserError
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from svdprune.runtime.vlm import Vlm
from tests.exporter import qwen_models
from tests.exporter.compile_gate import assert_passes
from tests.exporter.qwen_models import MOST, TOKEN

SIZES = [(640, 480), (56, 56), (200, 70), (33, 190), (5, 9), (61, 43), (300, 20)]  # width, height
SAVES: dict[str, Callable[..., Path]] = {"qwen2_5": qwen_models.save_qwen2_5, "qwen3": qwen_models.save_qwen3}
QUESTION = "What is in the picture?"


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
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tokens kept."""
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    export_model(ExportRequest(str(folder), "12", rank=4, out=out, report=False))
    return out


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vlm, Unpruned]]:
    """The bundle, and its graph without the selection, which gives all rows and levels."""
    with load(bundle, positions="original") as vlm:
        yield vlm, Unpruned(vlm, tmp_path_factory.mktemp("unpruned"))


@pytest.fixture(scope="module")
def larger(folder: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For pictures four times as large, and one budget of twelve over two of them."""
    out = tmp_path_factory.mktemp("bundles") / "larger"
    return with_vision(folder, bundle, out, keep=12, max_pixels=4 * MOST * TOKEN**2, pictures=2)


def with_vision(
    folder: Path,
    bundle: Path,
    out: Path,
    keep: int = 0,
    max_pixels: int | None = None,
    pictures: int | None = None,
    **options: Any,
) -> Path:
    """A copy of a bundle with another vision graph; `keep` 0 is all of the tokens."""
    shutil.copytree(bundle, out)
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    spec = described(family, checkpoint, "prompt" if pictures else "picture", pictures)
    if max_pixels is not None:
        assert spec.tiling is not None
        spec = dataclasses.replace(spec, tiling={**spec.tiling, "max_pixels": max_pixels})
    precision = options.pop("precision", "fp32")
    config, keep = SelectorConfig(**{"rank": 4, **options}), keep or spec.tokens
    save_graph(build_vision(checkpoint, family, spec, config, keep, precision=precision), out / "vision.onnx")
    manifest = json.loads((out / "manifest.json").read_text())
    tiles = spec.tiles()
    assert tiles is not None
    manifest["vision"] |= {"keep": keep, "tokens": spec.tokens, "precision": precision}
    manifest["vision"]["tiles"] = dataclasses.asdict(tiles)
    image = json.loads((out / "processor/image.json").read_text())
    (out / "processor/image.json").write_text(json.dumps(image | {"tiling": spec.tiling}))
    for file in ("vision.onnx", "processor/image.json"):
        content = (out / file).read_bytes()
        manifest["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1] // 7 + 2, size[0] // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def spec_of(folder: Path) -> VisionSpec:
    checkpoint = Checkpoint(folder)
    return family_of(checkpoint.config, "tiny").describe(checkpoint)


@torch.no_grad()
def unpruned(model: Any, folder: Path, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows (n, H), DeepStack levels (L, n, H) or None, and grid_thw of a picture, by transformers from the file on."""
    inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    out = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    levels = getattr(out, "deepstack_features", None)
    stacked = None if levels is None else torch.stack([torch.cat(list(level)) for level in levels])
    return torch.cat(list(out.pooler_output)), stacked, inputs["image_grid_thw"]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_pixels_are_those_of_the_processor(folder: Path, size: tuple[int, int]) -> None:
    image, spec = picture(size), spec_of(folder)
    assert spec.tiling is not None
    (view,) = tiling_of(spec.tiling).cut(image, 3).views
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    wanted = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)
    rows, columns = view.grid
    assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    patches = wanted["pixel_values"].reshape(rows, columns, 2, 2, 3, 2, TOKEN // 2, TOKEN // 2)
    for frame in (0, 1):
        pixels = patches[:, :, :, :, :, frame].transpose(0, 2, 5, 1, 3, 6, 4).reshape(view.pixels.shape)
        np.testing.assert_array_equal(view.pixels, pixels)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_all_tokens_kept_are_the_rows_of_transformers(
    folder: Path, model: Any, whole: tuple[Vlm, Unpruned], size: tuple[int, int]
) -> None:
    """Resizing, windows, rotary and learned positions, masks, mergers, DeepStack and M-RoPE at once."""
    image = picture(size)
    vlm, unselected = whole
    sight = unselected.see(image, vlm.see(image))
    rows, levels, grid = unpruned(model, folder, image)
    np.testing.assert_allclose(sight.features, rows.numpy(), atol=1e-4)
    if levels is not None:
        assert sight.deepstack is not None
        np.testing.assert_allclose(sight.deepstack, levels.numpy(), atol=1e-4)
    positions, delta = rope_index(model, [model.config.image_token_id] * len(rows), grid)
    assert sight.tiled is not None and sight.tiled.positions is not None
    np.testing.assert_array_equal(sight.tiled.positions.T, positions.numpy())
    assert sight.tiled.advance == len(rows) + delta


def rope_index(model: Any, ids: list[int], grid: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Positions int64 (3, n) of the prompt, and how far the next token is from its number."""
    prompt = torch.tensor([ids])
    types = (prompt == model.config.image_token_id).int()
    positions, delta = model.model.get_rope_index(prompt, mm_token_type_ids=types, image_grid_thw=grid)
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_choice_sees_the_tokens_of_this_picture_and_nothing_else(
    folder: Path, model: Any, bundle: Path, size: tuple[int, int]
) -> None:
    """No black edge of a tile, no empty slot: the choice of a selector that is given the picture's tokens alone."""
    image, spec = picture(size), spec_of(folder)
    with load(bundle) as vlm:
        sight, images = vlm.see(image), vlm.settings
    assert spec.tiling is not None
    cut = tiling_of(spec.tiling).cut(image, 3)
    family = family_of(Checkpoint(folder).config, "tiny")
    with torch.no_grad():
        pixels, places = torch.from_numpy(normalise(cut.pixels, images)), torch.from_numpy(cut.extras["places"])
        tokens, _ = family.reference_tokens(model, pixels, places)
        rows = tokens.flatten(0, 1)[cut.sources[:, 0]]
        scores = build_selector(SelectorConfig(rank=4), tokens=len(rows), channels=spec.channels)(rows[None])[0]
    count = min(12, len(rows))
    assert len(sight.kept_indices) == count  # never more than the tokens present
    np.testing.assert_allclose(sight.scores, scores.numpy(), atol=2e-4)
    np.testing.assert_array_equal(sight.kept_indices, keep_indices(scores.numpy(), count))


def test_a_graph_for_larger_pictures_keeps_the_same(bundle: Path, larger: Path) -> None:
    """More slots, more tiles, more pictures allowed: a picture that needs none of that is not touched."""
    image = picture((61, 43))
    with load(bundle) as vlm:
        first = vlm.see(image)
    with load(larger) as vlm:
        second = vlm.see(image)
        assert len(vlm.see(picture((640, 480))).scores) > MOST
    np.testing.assert_array_equal(first.kept_indices, second.kept_indices)
    np.testing.assert_allclose(first.features, second.features, atol=1e-5)
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)
    if first.deepstack is not None:
        np.testing.assert_allclose(first.deepstack, second.deepstack, atol=1e-5)


def test_one_budget_over_two_pictures_mixes_nothing_else(folder: Path, model: Any, larger: Path) -> None:
    """One SVD over the tokens of both, whose rows and levels are those that each has alone."""
    spec, images = spec_of(folder), [picture((61, 43)), picture((24, 100))]
    with load(larger) as vlm:
        sights, settings = vlm.see_all(images), vlm.settings
    assert spec.tiling is not None
    family, parts, kept = family_of(Checkpoint(folder).config, "tiny"), [], []
    for image, sight in zip(images, sights, strict=True):
        cut = tiling_of(spec.tiling).cut(image, 3)
        pixels, places = torch.from_numpy(normalise(cut.pixels, settings)), torch.from_numpy(cut.extras["places"])
        with torch.no_grad():
            tokens, _ = family.reference_tokens(model, pixels, places)
        kept.append(sight.kept_indices + sum(map(len, parts)))
        parts.append(tokens.flatten(0, 1)[cut.sources[:, 0]])
        rows, levels, _ = unpruned(model, folder, image)
        np.testing.assert_allclose(sight.features, rows[sight.kept_indices].numpy(), atol=1e-4)
        if levels is not None:
            assert sight.deepstack is not None
            np.testing.assert_allclose(sight.deepstack, levels[:, sight.kept_indices].numpy(), atol=1e-4)
    both = torch.cat(parts)
    scores = build_selector(SelectorConfig(rank=4), tokens=len(both), channels=spec.channels)(both[None])[0]
    np.testing.assert_array_equal(np.concatenate(kept), keep_indices(scores.numpy(), 12))
    graph = onnx.load(larger / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name


@torch.no_grad()
def answered(model: Any, ids: list[int], sight: Sight, found: Any, policy: str, count: int) -> list[int]:
    """Greedy answer of transformers, its own rows, levels and positions cut to the kept tokens.

    Args:
        ids: the prompt with one image token. found: of `unpruned`.
    """
    rows, levels, grid = found
    kept, place, image = sight.kept_indices, ids.index(model.config.image_token_id), model.config.image_token_id
    full = [*ids[:place], *[image] * len(rows), *ids[place + 1 :]]
    stay = np.r_[np.arange(place), place + kept, np.arange(place + len(rows), len(full))]
    embeds = model.get_input_embeddings()(torch.tensor([full]))[:, stay]
    embeds[0, place : place + len(kept)] = rows[kept]
    positions = rope_index(model, full, grid)[0][:, None, stay]
    if policy == "compact":
        positions = torch.arange(len(stay)).expand(3, 1, -1)
    mask = torch.zeros(1, len(stay), dtype=torch.bool)
    mask[0, place : place + len(kept)] = True
    made: list[int] = []
    while len(made) < count:
        more = {} if levels is None else {"visual_pos_masks": mask, "deepstack_visual_embeds": list(levels[:, kept])}
        ones = torch.ones(embeds.shape[:2], dtype=torch.long)
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False, **more
        )
        made.append(int(model.lm_head(out.last_hidden_state[0, -1]).argmax()))
        if made[-1] == 2:
            break
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[made[-1]]]))], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], 2)
        mask = torch.cat([mask, torch.zeros(1, 1, dtype=torch.bool)], 1)
    return made


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("size", [(640, 480), (33, 190)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_answers_are_transformers_for_the_same_kept_tokens(
    folder: Path, model: Any, bundle: Path, size: tuple[int, int], positions: str
) -> None:
    image = picture(size)
    with load(bundle, positions=positions) as vlm:
        sight = vlm.see(image)
        answer = vlm.ask(sight, QUESTION, max_new_tokens=12)
        ids = vlm.prompt_ids(QUESTION)
    assert answer.token_ids == answered(model, ids, sight, unpruned(model, folder, image), positions, 12)


@pytest.mark.parametrize("count", [1, 2])
def test_an_unpruned_answer_is_that_of_the_whole_model(
    folder: Path, model: Any, whole: tuple[Vlm, Unpruned], count: int
) -> None:
    images = [picture((200, 70)), picture((61, 43))][:count]
    vlm, unselected = whole
    sights = [unselected.see(image, vlm.see(image)) for image in images]
    answer = vlm.ask(sights, QUESTION, max_new_tokens=12)
    ids, image_token = vlm.prompt_ids(QUESTION, count), vlm.manifest.processor.image_token_id
    inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    totals, full = iter([sight.total for sight in sights]), []
    for token in ids:
        full += [image_token] * next(totals) if token == image_token else [token]
    prompt = torch.tensor([full])
    with torch.no_grad():
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=(prompt == image_token).int(),
            max_new_tokens=12,
            do_sample=False,
            **inputs,
        )
    assert answer.token_ids == made[0, prompt.shape[1] :].tolist()


def test_the_bundle_replays_its_golden_case(name: str, bundle: Path) -> None:
    report = verify(bundle)
    assert report.passed, report
    with load(bundle) as vlm:
        manifest = vlm.manifest
    assert manifest.positions == "original"  # where nothing is asked for
    decoder, levels = manifest.decoder, 2 if name == "qwen3" else 0
    assert (decoder.position_axes, decoder.deepstack, manifest.vision.deepstack) == (3, levels, levels)
    assert manifest.vision.tiles is not None and manifest.vision.tiles.extras == {"places": [4]}


def test_the_graph_keeps_to_the_rules_of_every_release(bundle: Path) -> None:
    graph = onnx.load(bundle / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert check_graph(graph, "11.4", TENSORRT_RTX) == []


@pytest.mark.slow
def test_half_precision_says_the_same(folder: Path, bundle: Path, tmp_path: Path) -> None:
    half = with_vision(folder, bundle, tmp_path / "half", keep=12, precision="fp16")
    image = picture((640, 480))
    with load(bundle) as vlm:
        first = vlm.see(image)
    with load(half) as vlm:
        np.testing.assert_allclose(first.scores, vlm.see(image).scores, atol=0.01)


@pytest.mark.slow
def test_the_sizes_of_the_published_models_build(name: str, tmp_path: Path) -> None:
    """Two layers of the 7B Qwen2.5-VL, in a window and over the whole picture; three with a level each of the 8B
    Qwen3-VL."""
    checkpoint = Checkpoint(qwen_models.save_vision(tmp_path, name))
    family = family_of(checkpoint.config, "big")
    spec = family.describe(checkpoint)
    tiles = spec.tiles()
    assert tiles is not None and spec.tokens == 1280
    assert (tiles.least, tiles.likely, tiles.most) == {"qwen2_5": (1, 30, 128), "qwen3": (64, 300, 1280)}[name]
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 128, precision="fp16", gpu=True), graph)
    assert_passes(graph, spec)


def test_an_engine_is_for_pictures_from_the_smallest_to_the_largest(bundle: Path) -> None:
    with load(bundle) as vlm:
        vision = vlm.manifest.vision
    assert vision.tiles is not None
    said = " ".join(vision_command(vision))
    assert f"places:{vision.tiles.least}x4" in said and f"places:{vision.tiles.most}x4" in said
    assert f"--optShapes=pixels:{vision.tiles.likely}x{vision.height}x{vision.width}x3" in said


def edited(folder: Path, out: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The checkpoint with another JSON file, the rest linked."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path)
    content = json.loads((folder / file).read_text())
    change(content)
    (out / file).unlink()
    (out / file).write_text(json.dumps(content))
    return out


def test_a_config_without_a_part_for_the_text_is_read(name: str, folder: Path, tmp_path: Path) -> None:
    """As Qwen2.5-VL's on the hub, which also has its limits of a picture under other names."""
    if name != "qwen2_5":
        pytest.skip("Qwen3-VL's configs have the part")

    def flat(config: dict[str, Any]) -> None:
        config.update({k: v for k, v in config.pop("text_config").items() if k != "model_type"})

    def older(processor: dict[str, Any]) -> None:
        size = processor.pop("size")
        processor.update(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])

    hub = edited(edited(folder, tmp_path / "a", "config.json", flat), tmp_path / "b", "preprocessor_config.json", older)
    assert spec_of(hub) == spec_of(folder)
    assert Checkpoint(hub).config["text_config"]["model_type"] == "qwen2_5_vl_text"


def test_the_largest_picture_may_be_set(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    spec = described(family, checkpoint, "picture", max_pixels=20 * TOKEN**2)
    assert spec.tiling is not None and spec.tiling["max_pixels"] == 20 * TOKEN**2
    assert spec.tokens < spec_of(folder).tokens
    for pixels in (TOKEN**2, 41 * TOKEN**2):
        with pytest.raises(UserError, match="give a number between them"):
            described(family, checkpoint, "picture", max_pixels=pixels)


def test_a_family_of_fixed_sizes_takes_no_largest_picture(tiny_llava: Path) -> None:
    checkpoint = Checkpoint(tiny_llava)
    with pytest.raises(UserError, match="takes pictures of fixed sizes"):
        described(family_of(checkpoint.config, "tiny"), checkpoint, "picture", max_pixels=1000)


def test_a_budget_by_tile_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(UserError, match="use --budget picture"):
        described(family_of(checkpoint.config, "tiny"), checkpoint, "tile")


def test_a_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = edited(folder, tmp_path / "other", "preprocessor_config.json", lambda p: p.update(patch_size=5))
    with pytest.raises(UserError, match="the processor's patch_size is 5 and the vision tower's patch_size is 4"):
        spec_of(other)
    other = edited(folder, tmp_path / "fixed", "preprocessor_config.json", lambda p: p.update(do_resize=False))
    with pytest.raises(UserError, match="does not resize pictures"):
        spec_of(other)


def test_levels_out_of_order_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    if name != "qwen3":
        pytest.skip("Qwen2.5-VL has no DeepStack")
    other = edited(
        folder, tmp_path / "other", "config.json", lambda c: c["vision_config"].update(deepstack_visual_indexes=[1, 0])
    )
    with pytest.raises(UserError, match="must rise and be below"):
        spec_of(other)
