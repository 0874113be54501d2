"""LLaVA with a DINOv2 or a SigLIP tower: transformers' rows, answers through a bundle, rules, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.rules import check_graph
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.towers.dinov2 import interpolated
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime import load
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import RELEASES
from svdprune.runtime.verify import verify
from tests.exporter.compile_gate import assert_passes
from tools.mini_llava.text import processor, train_tokenizer

PATCH = 14
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": PATCH}
# DINOv2's positions are for 5 x 5 patches and its pictures have 3 x 4.
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "dinov2": (
        Dinov2Config(**SIZES, image_size=5 * PATCH),
        {"vision_feature_layer": -2},
        {"height": 3 * PATCH, "width": 4 * PATCH},
    ),
    "siglip": (
        SiglipVisionConfig(**SIZES, intermediate_size=64, image_size=3 * PATCH),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"height": 3 * PATCH, "width": 3 * PATCH},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of random weights, saved as transformers saves it."""
    vision, options, size = KINDS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(pictures=40)
    torch.manual_seed(0)
    text = LlamaConfig(**TEXT, vocab_size=tokenizer.get_vocab_size())
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.token_to_id("<image>"), **options
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # the default initialisation is so small that every token looks alike
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.3 * torch.randn_like(p))
    model.save_pretrained(place)
    made: LlavaProcessor = processor(tokenizer, image_size=3 * PATCH)
    made.image_processor = CLIPImageProcessor(size=size, crop_size=size)
    if request.param == "siglip":
        made.vision_feature_select_strategy, made.num_additional_image_tokens = "full", 0
    made.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    made: dict[int, Path] = {}

    def make(keep: int) -> Path:
        if keep not in made:
            out = tmp_path_factory.mktemp(f"keep-{keep}") / "bundle"
            export_model(ExportRequest(model=str(folder), out=out, keep=str(keep), rank=4))
            made[keep] = out
        return made[keep]

    yield make


def changed(folder: Path, out: Path, file: str, **changes: Any) -> Checkpoint:
    """A copy of the checkpoint whose JSON `file` has other values; a dotted key reaches inside."""
    out.mkdir()
    for entry in folder.iterdir():
        (out / entry.name).symlink_to(entry)
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        *inner, last = key.split("__")
        place = content
        for name in inner:
            place = place[name]
        place[last] = value
    (out / file).unlink()
    (out / file).write_text(json.dumps(content))
    return Checkpoint(out)


def test_encoder_and_projector_compute_what_transformers_computes(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    spec = family.describe(checkpoint)
    reference = load_reference(checkpoint, print)
    pixels = torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, attention = family.encoder(checkpoint).float()(pixels)
        wanted, wanted_attention = family.reference_tokens(reference, pixels)
        own = reference.get_image_features(pixel_values=pixels)  # type: ignore[operator]
        features = family.projector(checkpoint).float()(tokens)
    assert tokens.shape == (2, spec.tokens, spec.channels)
    torch.testing.assert_close(tokens, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(features, torch.stack(list(getattr(own, "pooler_output", own))), atol=2e-5, rtol=1e-5)
    assert (attention is None) == (wanted_attention is None) == (not spec.cls)
    if attention is not None:
        torch.testing.assert_close(attention, wanted_attention, atol=1e-6, rtol=1e-5)


def test_all_tokens_kept_answer_as_transformers(folder: Path, bundle: Callable[[int], Path]) -> None:
    """Golden case of every export: rows, scores, kept set and greedy tokens against transformers."""
    spec = family_of((c := Checkpoint(folder)).config, "tiny").describe(c)
    for keep in (spec.tokens, 4):
        assert verify(bundle(keep)).passed
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    with load(bundle(4)) as vlm:
        assert vlm.ask(image, "What is it?", max_new_tokens=3).kept_indices.shape == (4,)


def test_the_graph_keeps_to_the_rules_of_every_release(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    model = ir.to_proto(
        build_vision(checkpoint, family, family.describe(checkpoint), SelectorConfig(rank=4), 4, precision="fp16")
    )
    for release in RELEASES:
        assert check_graph(model, release.tensorrt) == [], release.name


def test_a_table_of_the_same_size_is_left_alone() -> None:
    table = torch.randn(1, 1 + 25, 8)
    assert interpolated(table, (5, 5)) is table
    assert interpolated(table.half(), (3, 4)).dtype == torch.float16


@pytest.mark.parametrize(
    ("folder", "file", "changes", "said"),
    [
        ("dinov2", "config.json", {"vision_config__use_swiglu_ffn": True}, "SwiGLU"),
        ("dinov2", "config.json", {"vision_config__qkv_bias": False}, "without biases"),
        ("dinov2", "config.json", {"vision_feature_select_strategy": "full"}, "only 'default' is supported"),
        ("dinov2", "processor_config.json", {"image_processor__crop_size__height": 40}, "no whole patches"),
        ("siglip", "config.json", {"vision_feature_select_strategy": "default"}, "does not have: only 'full'"),
        ("siglip", "config.json", {"vision_config__image_size": 70}, "does not belong to its model"),
        ("siglip", "config.json", {"vision_config__model_type": "vit"}, "supported are clip_vision_model, siglip"),
    ],
    indirect=["folder"],
)  # fmt: skip
def test_variants_it_cannot_express_are_refused(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    checkpoint = changed(folder, tmp_path / "copy", file, **changes)
    with pytest.raises(UserError, match=said):
        family_of(checkpoint.config, "tiny").describe(checkpoint)


@pytest.mark.slow
def test_tensorrt_rtx_builds_two_layers_of_the_true_size(tmp_path: Path) -> None:
    """DINOv2-base on 16 x 16 patches, cut from the table of 37 x 37."""
    vision = Dinov2Config(num_hidden_layers=2, image_size=518)
    text = LlamaConfig(
        **{**TEXT, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}, vocab_size=64
    )
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).half().save_pretrained(tmp_path)
    size = {"height": 224, "width": 224}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    family = family_of(checkpoint.config, "big")
    spec = family.describe(checkpoint)
    assert spec.grid == (16, 16)
    graph = tmp_path / "vision.onnx"
    save_graph(build_vision(checkpoint, family, spec, SelectorConfig(), 64, precision="fp16", gpu=True), graph)
    assert_passes(graph)
