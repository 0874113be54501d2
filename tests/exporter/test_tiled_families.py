"""LLaVA-NeXT and LLaVA-OneVision: tiles, packing, selection and answers, held to transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.errors import UserError
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from tests.exporter import tiled_models

SIZES = [(640, 480), (60, 60), (200, 70), (33, 190), (500, 499), (41, 43), (300, 30)]  # width, height
SAVES: dict[str, Callable[..., Path]] = {"next": tiled_models.save_next, "onevision": tiled_models.save_onevision}
PROCESSORS: dict[str, Any] = {"next": LlavaNextImageProcessorPil, "onevision": LlavaOnevisionImageProcessorPil}
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
    """Bundles by their options, each exported once."""
    made: dict[str, Path] = {}

    def bundle(keep: str, **options: Any) -> Path:
        key = f"{keep} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            given = {"rank": 4, **options}
            export_model(ExportRequest(str(folder), keep, out=made[key], **given))
        return made[key]

    return bundle


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1] // 7 + 2, size[0] // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def tiling(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    spec = family_of(checkpoint.config, "tiny").describe(checkpoint)
    assert spec.tiling is not None
    return tiling_of(spec.tiling), spec


@torch.no_grad()
def unpruned(model: Any, folder: Path, name: str, image: Image.Image) -> torch.Tensor:
    """The picture's rows (total, H), by transformers from the file on."""
    inputs = PROCESSORS[name].from_pretrained(folder)(image, return_tensors="pt")
    sizes = inputs["image_sizes"]
    rows: torch.Tensor = model.model.get_image_features(inputs["pixel_values"], sizes).pooler_output[0]
    return rows


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
    with load(bundles("100%", select="none", budget=budget)) as vlm:
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
    with load(bundles(str(keep))) as vlm:
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
    with load(bundles("12", centre=True)) as vlm:
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
    with load(bundles("4", budget="tile")) as vlm:
        sight = vlm.see(image := picture((640, 480)))
    cut = tiling(folder)[0].cut(image, 3)
    owners, present = np.bincount(cut.tile[sight.kept_indices]), np.bincount(cut.tile)
    np.testing.assert_array_equal(owners, np.minimum(present, 4))
    assert (np.diff(sight.places) > 0).all()


def test_a_newline_stays_with_a_kept_token_of_its_line(bundles: Bundles, folder: Path, model: Any) -> None:
    with load(bundles("12")) as vlm:
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
    with load(bundles("12" if budget == "picture" else "4", budget=budget), positions=positions) as vlm:
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


@pytest.mark.parametrize(
    "options", [{}, {"budget": "tile", "keep": "4"}, {"precision": "fp16"}, {"input": "float32"}], ids=str
)
def test_the_bundle_replays_its_golden_case(bundles: Bundles, options: dict[str, str]) -> None:
    options = dict(options)
    bundle = bundles(options.pop("keep", "12"), **options)
    report = verify(bundle)
    assert report.passed, report
    tiles = open_bundle(bundle).manifest.vision.tiles
    assert tiles is not None and tiles.budget == options.get("budget", "picture")


@pytest.mark.parametrize(
    "options", [{}, {"budget": "tile", "keep": "4"}, {"precision": "fp16"}, {"select": "norm"}], ids=str
)
def test_the_graph_keeps_to_the_rules_of_every_release(bundles: Bundles, options: dict[str, str]) -> None:
    options = dict(options)
    graph = onnx.load(bundles(options.pop("keep", "12"), **options) / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert check_graph(graph, "11.4", TENSORRT_RTX) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "10000"}, "keep 10000 tokens: the picture has"),
        ({"keep": "10", "budget": "tile"}, "keep 10 tokens: the picture has 9"),
        ({"select": "grid"}, "needs a picture of a fixed number of tokens"),
        ({"select": "maxmin"}, "needs a picture of a fixed number of tokens"),
        ({"precision": "int8"}, "the precision int8 is not there yet"),
        ({"keep": "auto"}, "a search for K .* is not there yet"),
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


def test_cls_attention_needs_a_cls_token(name: str, folder: Path, tmp_path: Path) -> None:
    request = ExportRequest(str(folder), "4", select="cls", out=tmp_path / "bundle")
    if name == "onevision":
        with pytest.raises(UserError, match=r"needs a \[CLS\] token"):
            export_model(request)
        return
    export_model(request)
    assert verify(tmp_path / "bundle").passed
