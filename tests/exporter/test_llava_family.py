"""The vision half of LLaVA against transformers' own, and the variants that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.processor import image_values, write_processor
from svdprune.runtime.errors import UserError


def edited(folder: Path, tmp_path: Path, **changes: object) -> Checkpoint:
    """A copy of the checkpoint whose config.json has other values; a dotted key reaches inside."""
    copy = tmp_path / "edited"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place, *inner = key.split("__")
        if inner:
            config[place][inner[0]] = value
        else:
            config[place] = value
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    return Checkpoint(copy)


def test_encoder_and_projector_compute_what_transformers_computes(tiny_llava: Path) -> None:
    checkpoint = Checkpoint(tiny_llava)
    family = family_of(checkpoint.config, "tiny")
    spec = family.describe(checkpoint)
    reference = load_reference(checkpoint, print)
    pixels = torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, attention = family.encoder(checkpoint).float()(pixels)
        wanted_tokens, wanted_attention = family.reference_tokens(reference, pixels)
        features = family.projector(checkpoint).float()(tokens)
        wanted_features = family.reference_project(reference, wanted_tokens)
    assert tokens.shape == (2, spec.tokens, spec.channels)
    torch.testing.assert_close(tokens, wanted_tokens, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(attention, wanted_attention, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features, wanted_features, atol=2e-5, rtol=1e-5)


def test_layers_after_the_tap_are_neither_read_nor_built(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_llava)
    read: list[str] = []
    original = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or original(self, name))
    family = family_of(checkpoint.config, "tiny")
    family.encoder(checkpoint)
    family.projector(checkpoint)
    layers = checkpoint.config["vision_config"]["num_hidden_layers"]
    assert read
    assert not [n for n in read if n.startswith(f"model.vision_tower.encoder.layers.{layers - 1}.")]
    assert not [n for n in read if "language_model" in n or n.startswith("lm_head")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_feature_select_strategy": "full"}, "only 'default' is supported"),
        ({"vision_feature_layer": [-2, -5]}, "features of several layers"),
        ({"vision_config__model_type": "vit"}, "'vit' vision tower is not supported: supported are clip_vision_model"),
        ({"vision_config__image_size": 56}, "does not belong to its model"),
    ],
)
def test_variants_it_cannot_express_are_refused(
    tiny_llava: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    checkpoint = edited(tiny_llava, tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        family_of(checkpoint.config, "tiny").describe(checkpoint)


def test_a_tap_that_does_not_exist_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = edited(tiny_llava, tmp_path, vision_feature_layer=-9)
    with pytest.raises(UserError, match="-9 does not exist in a vision tower of"):
        family_of(checkpoint.config, "tiny").encoder(checkpoint)


def test_families_that_are_not_supported_are_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"not a vision-language model.*supported are llava"):
        family_of({"model_type": "llama"}, "x")
    with pytest.raises(UserError, match="'qwen2_vl', which is not supported yet: supported are llava"):
        family_of({"model_type": "qwen2_vl", "vision_config": {}}, "x")


def test_both_layouts_of_processor_files_say_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    new = Checkpoint(tiny_llava)
    nested = json.loads((tiny_llava / "processor_config.json").read_text())["image_processor"]
    old_folder = tmp_path / "old"
    old_folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (old_folder / name).symlink_to(tiny_llava / name)
    (old_folder / "preprocessor_config.json").write_text(json.dumps(nested))
    template = (tiny_llava / "chat_template.jinja").read_text()
    (old_folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    bos = {"content": "<s>", "lstrip": False}
    (old_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))
    old = Checkpoint(old_folder)
    assert image_values(old) == image_values(new)
    info = write_processor(old, tmp_path / "processor")
    assert info == write_processor(new, tmp_path / "other" / "processor")
    assert (tmp_path / "processor" / "chat_template.jinja").read_text() == template


def test_missing_processor_files_are_named(tiny_llava: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_llava / name)
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        image_values(Checkpoint(bare))
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        write_processor(Checkpoint(bare), tmp_path / "processor")
    (bare / "tokenizer.json").symlink_to(tiny_llava / "tokenizer.json")
    with pytest.raises(UserError, match="no chat template"):
        write_processor(Checkpoint(bare), tmp_path / "processor")
