"""Several pictures in a prompt and videos, held to transformers: LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.runtime import load
from svdprune.runtime.answer import Sight
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import UserError
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.verify import verify
from svdprune.runtime.vlm import Vlm
from tests.exporter import tiled_models

KEEP = 6
QUESTION = "What is in the picture?"
SAVES: dict[str, Callable[[Path], Path]] = {"next": tiled_models.save_next, "onevision": tiled_models.save_onevision}
PROCESSORS: dict[str, Any] = {
    "llava": CLIPImageProcessorPil,
    "next": LlavaNextImageProcessorPil,
    "onevision": LlavaOnevisionImageProcessorPil,
}
ONE = ("llava", "onevision")  # the families that a bundle with one budget is made for here: an export takes seconds
Bundles = Callable[[str], Path]


@pytest.fixture(scope="module", params=list(PROCESSORS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def store() -> dict[str, Path]:
    """What was made so far, whatever the order of the tests."""
    return {}


@pytest.fixture(scope="module")
def folder(name: str, store: dict[str, Path], tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if name not in store:
        store[name] = tiny_llava if name == "llava" else SAVES[name](tmp_path_factory.mktemp(name))
    return store[name]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def bundles(name: str, store: dict[str, Path], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """A bundle by its budget, `picture` or `prompt`."""

    def bundle(budget: Any) -> Path:
        key = f"{name} {budget}"
        if key not in store:
            more = {"budget": budget, "prompt_pictures": 2} if budget == "prompt" else {}
            out = tmp_path_factory.mktemp("bundles") / "bundle"
            export_model(ExportRequest(str(folder), str(KEEP), rank=4, out=out, report=False, **more))
            store[key] = out
        return store[key]

    return bundle


def pictures() -> list[Image.Image]:
    made = []
    for seed, (width, height) in enumerate([(120, 80), (60, 90), (50, 50)]):
        noise = np.random.default_rng(seed).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
        made.append(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return made


@torch.no_grad()
def unpruned(model: Any, folder: Path, name: str, images: list[Image.Image]) -> list[torch.Tensor]:
    """Each picture's rows (total, H), by transformers from the files on, as of one message with all of them."""
    inputs = PROCESSORS[name].from_pretrained(folder)([images], return_tensors="pt")
    rows = model.model.get_image_features(**inputs).pooler_output
    return list(rows)


@torch.no_grad()
def wanted_answer(model: Any, vlm: Vlm, ids: list[int], rows: list[torch.Tensor], sights: list[Sight]) -> list[int]:
    """Greedy ids by transformers from rows at the kept places, positions counted here."""
    image_token = vlm.manifest.processor.image_token_id
    prompt: list[int] = []
    where: list[int] = []
    at, seen = 0, iter(zip(rows, sights, strict=True))
    for token in ids:
        if token != image_token:
            prompt.append(token)
            where.append(at)
            at += 1
            continue
        own, sight = next(seen)
        prompt += [image_token] * len(own)
        if vlm.positions == "original":
            where += (at + sight.places).tolist()
            at += sight.total
        else:
            where += range(at, at + len(own))
            at += len(own)
    answer: list[int] = []
    for _ in range(8):
        out = model(
            input_ids=torch.tensor([[*prompt, *answer]]),
            attention_mask=torch.ones(1, len(prompt) + len(answer), dtype=torch.long),
            position_ids=torch.tensor([[*where, *range(at, at + len(answer))]]),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=rows)},
            use_cache=False,
        )
        answer.append(int(out.logits[0, -1].argmax()))
        if answer[-1] in vlm.manifest.decoder.eos:
            break
    return answer


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    ("name", "budget"),
    [*((name, "picture") for name in PROCESSORS), *((name, "prompt") for name in ONE)],
    indirect=["name"],
    scope="module",
)
def test_two_pictures_are_answered_as_by_transformers(
    name: str, folder: Path, model: Any, bundles: Bundles, budget: str, positions: str
) -> None:
    images = pictures()[:2]
    whole = unpruned(model, folder, name, images)
    with load(bundles(budget), positions=positions) as vlm:
        sights = vlm.see_all(images)
        assert [sight.total for sight in sights] == [len(rows) for rows in whole]
        rows = [own[sight.places] for own, sight in zip(whole, sights, strict=True)]
        for own, sight in zip(rows, sights, strict=True):
            np.testing.assert_allclose(sight.features, own.numpy(), atol=2e-4)
        kept = [len(sight.kept_indices) for sight in sights]
        assert kept == [KEEP, KEEP] if budget == "picture" else sum(kept) == KEEP
        answer = vlm.ask(images, QUESTION, max_new_tokens=8)
        assert answer.token_ids == wanted_answer(model, vlm, vlm.prompt_ids(QUESTION, 2), rows, sights)
        assert answer.tokens.prompt == len(vlm.prompt_ids(QUESTION, 2)) - 2 + sum(map(len, rows))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ONE, indirect=True, scope="module")
def test_one_svd_over_the_tokens_of_all_pictures(
    name: str, folder: Path, model: Any, bundles: Bundles, count: int
) -> None:
    """The choice is that of a selector that is given these pictures' tokens and nothing else."""
    images = pictures()[:count]
    with load(bundles("prompt")) as vlm:
        sights, settings, info = vlm.see_all(images), vlm.settings, vlm.manifest.vision
    assert info.tiles is not None and (info.tiles.budget, info.tiles.pictures) == ("prompt", 2)
    family = family_of(Checkpoint(folder).config, "tiny")
    assert settings.tiling is not None
    tiling = tiling_of(settings.tiling, pictures=count)
    tokens = []
    with torch.no_grad():
        for image in images:
            cut = tiling.cut(image, settings.resample)
            found, _ = family.reference_tokens(model, torch.from_numpy(normalise(cut.pixels, settings)))
            tokens.append((found.flatten(0, 1)[cut.sources] * torch.from_numpy(cut.weights)[..., None]).sum(1))
        together = torch.cat(tokens)
        scores = build_selector(SelectorConfig(rank=4), tokens=len(together), channels=together.shape[1])
        wanted = scores(together[None])[0].numpy()
    np.testing.assert_allclose(np.concatenate([sight.scores for sight in sights]), wanted, atol=2e-4)
    starts = np.cumsum([0, *(len(own) for own in tokens[:-1])])
    kept = np.concatenate([sight.kept_indices + start for sight, start in zip(sights, starts, strict=True)])
    np.testing.assert_array_equal(kept, keep_indices(wanted, KEEP))


@pytest.mark.parametrize("name", ONE, indirect=True, scope="module")
def test_one_budget_is_for_as_many_pictures_as_were_said(bundles: Bundles) -> None:
    assert verify(bundles("prompt")).passed
    for release in RELEASES:
        assert check_graph(onnx.load(bundles("prompt") / "vision.onnx"), release.tensorrt) == [], release.name
    with load(bundles("prompt")) as vlm:
        with pytest.raises(UserError, match="up to 2 pictures of a prompt, 3 were given: give fewer"):
            vlm.ask(pictures(), QUESTION)
        chat = vlm.chat(pictures()[0])
        assert len(chat.ask(QUESTION, max_new_tokens=2).kept_indices) == KEEP
        with pytest.raises(UserError, match=r"give all (of them at once|pictures with the first question)"):
            chat.ask(QUESTION, images=pictures()[1])


def test_a_picture_of_a_later_turn(name: str, bundles: Bundles) -> None:
    images = pictures()
    with load(bundles("picture")) as vlm:
        chat = vlm.chat(images[:2])
        chat.ask(QUESTION, max_new_tokens=2)
        later = chat.ask(QUESTION, max_new_tokens=4, images=images[2])
        logits = vlm.cached_prompt(vlm.see_all(images)).advance(vlm.text.prompt_ids(chat.messages[:-1]))
        assert later.token_ids[0] == int(logits.argmax())
        alone = vlm.chat(images[0])
        if name == "onevision":  # which sees a picture in tiles when it is alone
            with pytest.raises(UserError, match="give all pictures with the first question"):
                alone.ask(QUESTION, images=images[1])
        else:
            assert len(alone.ask(QUESTION, images=images[1], max_new_tokens=2).pictures) == 2


def test_frames_of_a_video(name: str, folder: Path, model: Any, bundles: Bundles) -> None:
    """OneVision pools them into one picture, as its `get_video_features`; others see so many pictures."""
    frames = [*pictures(), *pictures()[:2]]
    with load(bundles("picture")) as vlm:
        sights = vlm.see_video(frames)
        if name != "onevision":
            assert len(sights) == len(frames)
            return
        (sight,) = sights
        assert sight.tiled is not None and sight.total == len(frames) * 4 + 1
        pixels = np.stack([view.pixels for view in sight.tiled.views])
        with torch.no_grad():
            given = torch.from_numpy(normalise(pixels, vlm.settings))[None]
            whole = model.model.get_video_features(given, vision_feature_layer=-1).pooler_output[0]
        rows = whole[sight.places]
        np.testing.assert_allclose(sight.features, rows.numpy(), atol=2e-4)
        assert len(sight.kept_indices) == KEEP and sight.places[-1] == len(frames) * 4  # the newline stays
        answer = vlm.ask(sights, QUESTION, max_new_tokens=8)
        assert answer.token_ids == wanted_answer(model, vlm, vlm.prompt_ids(QUESTION), [rows], sights)
        with pytest.raises(UserError, match="the video has 50 frames, the vision graph takes 10: give --frames 10"):
            vlm.see_video(frames * 10)


def test_the_command_line_takes_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[ExportRequest] = []

    def noted(request: ExportRequest, *_: Any) -> None:
        asked.append(request)
        raise UserError("that is all")

    monkeypatch.setattr("svdprune.exporter.export.export_model", noted)
    line = ["export", "somewhere", "--keep", "6", "--budget", "prompt", "--prompt-pictures", "3"]
    assert isinstance(CliRunner().invoke(group, line).exception, SystemExit | UserError)
    assert [(request.budget, request.prompt_pictures) for request in asked] == [("prompt", 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "prompt"}, "say how many at most, --prompt-pictures N"),
        ({"budget": "prompt", "prompt_pictures": 0}, "a prompt of 0 pictures cannot be"),
        ({"budget": "prompt", "prompt_pictures": 2, "keep": "auto"}, "with --budget prompt, give a count"),
    ],
)
def test_budgets_that_cannot_be(tiny_llava: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    request = ExportRequest(str(tiny_llava), **{"keep": "6", "rank": 4, "out": tmp_path / "bundle", **options})
    with pytest.raises(UserError, match=words):
        export_model(request)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ONE, indirect=True, scope="module")
def test_inspect_says_the_budget(bundles: Bundles) -> None:
    told = CliRunner().invoke(group, ["inspect", str(bundles("prompt"))], catch_exceptions=False).output
    assert "6 of up to 2 pictures together" in " ".join(told.split())
