"""PaliGemma 1 and 2 and Gemma 3: towers, pooling, prompts, masks and answers, held to transformers' own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.text import TextProcessor, assistant_message, user_message
from svdprune.runtime.traps import TENSORRT_RTX
from svdprune.runtime.verify import verify
from tests.exporter import gemma_models
from tests.exporter.compile_gate import assert_passes

SAVES: dict[str, Callable[[Path], Path]] = {
    "paligemma": gemma_models.save_paligemma,
    "paligemma2": gemma_models.save_paligemma2,
    "gemma3": gemma_models.save_gemma3,
}
TOKENS = {"paligemma": 36, "paligemma2": 36, "gemma3": 16}
QUESTION = "What is in the picture?"
KEEP, NEW = 7, 12


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
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pruned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that keeps K of T."""
    bundle = tmp_path_factory.mktemp("bundles") / "pruned"
    export_model(ExportRequest(str(folder), str(KEEP), rank=4, out=bundle, report=False))
    return bundle


@pytest.fixture(scope="module")
def whole(name: str, folder: Path, pruned: Path) -> Path:
    """The same with a vision graph that keeps all."""
    bundle = pruned.parent / "whole"
    shutil.copytree(pruned, bundle)
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, name)
    spec = family.describe(checkpoint)
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig("none"), spec.tokens), bundle / "vision.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["vision"]["keep"] = spec.tokens
    graph = (bundle / "vision.onnx").read_bytes()
    manifest["files"]["vision.onnx"] = {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture(scope="module")
def text(pruned: Path) -> TextProcessor:
    return TextProcessor.from_bundle(open_bundle(pruned))


def picture(size: tuple[int, int] = (640, 480)) -> Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1] // 7 + 2, size[0] // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@torch.no_grad()
def unpruned(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    """The picture's rows (T, H), by transformers from the picture on."""
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    rows: torch.Tensor = model.model.get_image_features(pixels).pooler_output[0]
    return rows


def test_all_tokens_kept_are_the_rows_of_transformers(name: str, model: Any, processor: Any, whole: Path) -> None:
    """Pixels, tower, last norm, pooling and projector at once."""
    with load(whole) as vlm:
        for size in ((640, 480), (60, 200), (85, 85)):
            wanted = unpruned(model, processor, picture(size))
            assert len(wanted) == TOKENS[name]
            np.testing.assert_allclose(vlm.see(picture(size)).features, wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("kept", ["pruned", "whole"])
def test_answers_are_those_of_transformers_given_the_kept_tokens(
    name: str, model: Any, processor: Any, kept: str, positions: str, request: pytest.FixtureRequest
) -> None:
    """Masks, windows, scaled embeddings and soft caps at once: the whole prompt sees itself, or a picture does."""
    image = picture()
    with load(request.getfixturevalue(kept), positions=positions) as vlm:
        sight = vlm.see(image)
        answer = vlm.ask(sight, QUESTION, max_new_tokens=NEW)
        logits = vlm.first_logits(sight, QUESTION)
        ids, image_token = vlm.prompt_ids(QUESTION), vlm.manifest.processor.image_token_id
    rows = unpruned(model, processor, image)[sight.kept_indices][None]
    place, count = ids.index(image_token), rows.shape[1]
    prompt = torch.tensor([[*ids[:place], *[image_token] * count, *ids[place + 1 :]]])
    types = (prompt == image_token).long() if name == "gemma3" else torch.zeros_like(prompt)
    wanted: list[int] = []
    first: list[np.ndarray] = []
    if positions == "compact":  # the whole of transformers: placeholders, merging, masks, generation with a cache
        made = model.generate(
            input_ids=prompt,
            token_type_ids=types,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=rows)},
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        wanted, first = made.sequences[0, prompt.shape[1] :].tolist(), [made.logits[0][0].numpy()]
    else:
        spots = place + sight.kept_indices
        position = torch.tensor([[*range(place), *spots, *(place + TOKENS[name] + np.arange(len(ids) - place - 1))]])
        while len(wanted) < NEW and wanted[-1:] != [2]:
            with torch.no_grad():
                out = model(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    token_type_ids=types,
                    position_ids=position,
                    mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=rows)},
                    use_cache=False,
                )
            first.append(out.logits[0, -1].numpy())
            wanted.append(int(first[-1].argmax()))
            prompt = torch.cat([prompt, torch.tensor([[wanted[-1]]])], 1)
            suffix = torch.zeros_like(types[:, :1]) if name == "gemma3" else torch.ones_like(types[:, :1])
            types, position = torch.cat([types, suffix], 1), torch.cat([position, position[:, -1:] + 1], 1)
    assert answer.token_ids == wanted
    np.testing.assert_allclose(logits, first[0], atol=2e-5)


def test_the_mask_is_the_models(name: str, pruned: Path) -> None:
    """A prompt run under another mask has other logits: the parity above would not hold by chance."""
    manifest = open_bundle(pruned).manifest
    assert manifest.decoder.mask == ("picture" if name == "gemma3" else "prefix")
    with load(pruned) as vlm:
        sight = vlm.see(picture())
        features = sight.features
        ids = vlm.prompt_ids(QUESTION)
        place = ids.index(manifest.processor.image_token_id)
        rows = np.concatenate([vlm.embed(ids[:place]), features, vlm.embed(ids[place + 1 :])])
        causal = vlm.decoder.start().append(rows, np.arange(len(rows)))
        ours = vlm.first_logits(sight, QUESTION)
        assert np.abs(causal - ours).max() > 0.02 * np.abs(ours).max()


def test_the_bundle_replays_its_golden_case(pruned: Path) -> None:
    report = verify(pruned)
    assert report.passed, report


def test_the_prompt_is_the_processors(name: str, processor: Any, text: TextProcessor) -> None:
    """The same ids, once the picture's token stands as often as the picture has rows."""
    ids = text.prompt_ids([user_message(QUESTION, picture=True)])
    if name == "gemma3":
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        given = processor(text=rendered, images=picture(), add_special_tokens=False)
    else:
        given = processor(text="<image>" + QUESTION, images=picture())
    place = ids.index(text.image_token_id)
    assert given["input_ids"][0] == [*ids[:place], *[text.image_token_id] * TOKENS[name], *ids[place + 1 :]]


def test_a_conversation(name: str, text: TextProcessor) -> None:
    turns = [user_message(QUESTION, True), assistant_message("a red square"), user_message("And below it?", False)]
    if name == "gemma3":
        assert text.prompt_ids(turns)[: len(text.prompt_ids(turns[:1]))] == text.prompt_ids(turns[:1])
        return
    with pytest.raises(UserError, match="PaliGemma takes one question about a picture: start a new chat"):
        text.prompt_ids(turns)


def test_several_pictures_come_before_the_question(name: str, processor: Any, text: TextProcessor) -> None:
    turn = user_message(QUESTION, picture=True)
    turn["content"].insert(0, {"type": "image"})
    ids = text.prompt_ids([turn])
    assert ids.count(text.image_token_id) == 2
    if name != "gemma3":
        given = processor(text="<image><image>" + QUESTION, images=[[picture()] * 2])
        assert [i for i in given["input_ids"][0] if i != text.image_token_id] == ids[2:]


def test_the_graph_keeps_to_the_rules_of_every_release(pruned: Path) -> None:
    graph = onnx.load(pruned / "vision.onnx")
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    assert check_graph(graph, "11.4", TENSORRT_RTX) == []


def test_what_needs_a_class_token_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a \[CLS\] token"):
        export_model(ExportRequest(str(folder), "4", select="cls", out=tmp_path / "bundle"))


CHANGES: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "paligemma": [
        ("config.json", {"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' vision tower"),
        ("processor_config.json", {"image_processor": {"image_seq_length": 9}}, "gives a picture 9 tokens"),
        ("processor_config.json", {"image_processor": {"size": {"height": 20, "width": 20}}}, "takes squares of 84"),
    ],
    "paligemma2": [],
    "gemma3": [
        ("config.json", {"mm_tokens_per_image": 9}, "does not divide 8 x 8 patches"),
        ("config.json", {"mm_tokens_per_image": 8}, "does not divide 8 x 8 patches"),
        ("processor_config.json", {"image_processor": {"do_pan_and_scan": True}}, "do_pan_and_scan"),
    ],
}


def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, folder: Path) -> None:
    for number, (file, change, said) in enumerate(CHANGES[name]):
        changed = tmp_path / str(number)
        changed.mkdir()
        for path in folder.iterdir():
            (changed / path.name).symlink_to(path)
        content = json.loads((folder / file).read_text())
        for key, value in change.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (changed / file).unlink()
        (changed / file).write_text(json.dumps(content))
        checkpoint = Checkpoint(changed)
        with pytest.raises(UserError, match=said):
            family_of(checkpoint.config, "tiny").describe(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paligemma", "gemma3"])
def test_the_sizes_of_the_published_models_build(kind: str, tmp_path: Path) -> None:
    """SigLIP-so400m at 224 (256 tokens) and at 896 (4,096 patches, 256 averages), two layers, in half precision."""
    checkpoint = Checkpoint(gemma_models.save_vision(tmp_path, kind))
    family = family_of(checkpoint.config, "big")
    spec = family.describe(checkpoint)
    assert (spec.tokens, spec.hidden) == (256, {"paligemma": 2048, "gemma3": 2560}[kind])
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 64, precision="fp16", gpu=True), graph)
    assert_passes(graph)
