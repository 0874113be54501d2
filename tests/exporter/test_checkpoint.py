"""Checkpoint folders: every layout read as one, one tensor at a time, and each way to be broken named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svdprune.exporter.checkpoint import Checkpoint, canonical_name
from svdprune.runtime.errors import UserError

HUB = {
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
    "vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.q_proj.weight": "model.language_model.layers.1.self_attn.q_proj.weight",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "image_newline": "model.image_newline",
}
BETWEEN = {  # saved by some versions in between
    "vision_tower.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
    "language_model.norm.weight": "model.language_model.norm.weight",
}


@pytest.mark.parametrize(("old", "new"), [*HUB.items(), *BETWEEN.items()])
def test_canonical_names(old: str, new: str) -> None:
    assert canonical_name(old) == new
    assert canonical_name(new) == new
    assert canonical_name("model." + old) == new or old == "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("model.text_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.connector.modality_projection.proj.weight", "model.connector.modality_projection.proj.weight"),
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_parts_that_other_families_name_otherwise(other: str, ours: str) -> None:
    assert canonical_name(other) == ours
    assert canonical_name(ours) == ours


def test_names_of_no_known_layout_are_left_alone() -> None:
    for name in ("audio.blocks.0.weight", "vision_tower_2.weight", "lm_head.weight", "my_language_model.model.weight"):
        assert canonical_name(name) == name


def weights(names: Any = HUB) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 3, generator=generator).half() for name in names}


def write_single(folder: Path, names: Any = HUB) -> Path:
    save_file(weights(names), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return folder


def write_sharded(folder: Path) -> Path:
    tensors = list(weights().items())
    index = {}
    for number, part in enumerate((tensors[:3], tensors[3:])):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        index.update({key: name for key, _ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return folder


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_tensors_are_read_by_canonical_name(write: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path))
    assert checkpoint.config == {"model_type": "llava"}
    assert checkpoint.names() == sorted(HUB.values())
    for old, tensor in weights().items():
        assert HUB[old] in checkpoint
        assert checkpoint.info(HUB[old]).dtype == "F16"
        assert checkpoint.info(HUB[old]).shape == (4, 3)
        assert torch.equal(checkpoint.tensor(HUB[old]), tensor)
    found = checkpoint.tensors(["model.vision_tower.", "model.multi_modal_projector."])
    assert sorted(found) == [name for name in sorted(HUB.values()) if "vision_tower" in name or "projector" in name]
    assert list(checkpoint.tensors("lm_head.")) == ["lm_head.weight"]


def test_layouts_give_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = Checkpoint(write_single(tmp_path / "old", HUB.keys()))
    new = Checkpoint(write_single(tmp_path / "new", HUB.values()))
    assert old.names() == new.names()


def test_only_the_asked_for_shard_is_opened(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sharded(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    checkpoint.tensors("model.vision_tower.")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        checkpoint.tensor("lm_head.weight")


def test_fingerprint_follows_content_names_and_config(tmp_path: Path) -> None:
    first = Checkpoint(write_single(tmp_path)).fingerprint()
    assert first == Checkpoint(write_single(tmp_path)).fingerprint()
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one weight: names, sizes and header stay
    file.write_bytes(content)
    second = Checkpoint(tmp_path).fingerprint()
    (tmp_path / "config.json").write_text('{"model_type": "llava", "x": 1}')
    third = Checkpoint(tmp_path).fingerprint()
    assert len({first, second, third}) == 3
    assert all(len(value) == 64 for value in (first, second, third))


def test_a_missing_tensor_or_prefix_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_single(tmp_path))
    with pytest.raises(UserError, match=r"no tensor model\.absent"):
        checkpoint.tensor("model.absent")
    with pytest.raises(UserError, match=r"no tensors named visual\.\*"):
        checkpoint.tensors(["lm_head.", "visual."])


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no folder at .*absent")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, r"has no config\.json")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_config_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, r"config\.json is not (valid JSON|a JSON object)")


def test_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, r"config\.json is not valid JSON")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"neither model\.safetensors nor")


def test_weights_as_pickle_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, r"\.bin or \.pth only.*save_pretrained")


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"lacks 1 of 2 weight files \(model-00002-of-00002\.safetensors\)")


def test_an_index_without_weights(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(tmp_path, "names no weights")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_named(keep: int, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, r"model-00002-of-00002\.safetensors is truncated.*download it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        ((10).to_bytes(8, "little") + b"not a json", "header cannot be read"),
        ((14).to_bytes(8, "little") + b'{"a": {"b":1}}', "header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}" + b"more", "has 14 bytes where its header says 10"),
    ],
)
def test_a_file_that_is_not_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, message)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    write_single(tmp_path, ["language_model.lm_head.weight", "lm_head.weight"])
    refused(tmp_path, r"holds lm_head\.weight twice")
