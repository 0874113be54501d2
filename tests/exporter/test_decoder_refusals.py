"""What the decoder export will not do, each with its sentence; and the less usual checkpoints that it takes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaForConditionalGeneration, Qwen2Config

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder import export_decoder
from svdprune.exporter.decoder.config import decoder_config
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError
from tests.exporter.decoder_models import SIZES, TEXT, exported_greedy, load, make_model, prompt, reference_greedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; the decoder export knows: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "type None"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "kind chunked_attention"),
        ({"model_type": "qwen2_5_vl_text", "rope_parameters": {"rope_theta": 1e4}}, "mrope_section None"),
        (
            {"model_type": "qwen3_vl_text", "rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 2, 1]}},
            "must share out 8 columns",
        ),
        ({"model_type": "gemma", "head_dim": 16, "use_bidirectional_attention": True}, "all see each other"),
        ({"model_type": "gemma3_text", "head_dim": 16, "attn_logit_softcapping": 50.0}, "does not read"),
        ({"num_key_value_heads": 3}, "multiple of key-value heads"),
        ({"head_dim": 12}, "head size of 12"),
        ({"num_hidden_layers": "two"}, "not a valid llama configuration"),
    ],
)
def test_configurations_that_the_graph_cannot_express(changes: dict[str, Any], message: str) -> None:
    config = TEXT["llama"].to_dict() | changes
    with pytest.raises(UserError, match=message) as caught:
        decoder_config(config)
    assert "\n" not in str(caught.value)


def test_more_levels_of_features_than_layers() -> None:
    with pytest.raises(UserError, match="3 levels of DeepStack features for fewer layers"):
        decoder_config(TEXT["llama"].to_dict(), deepstack=3)


def test_old_spelling_of_rotary_scaling_is_read() -> None:
    old = {"model_type": "llama", **SIZES, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"model_type": "llama", **SIZES}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert torch.equal(decoder_config(old).rotaries[0].cos, decoder_config(new).rotaries[0].cos)
    assert not torch.equal(
        decoder_config(old).rotaries[0].cos, decoder_config({"model_type": "llama", **SIZES}).rotaries[0].cos
    )


def test_a_sparse_text_config_has_the_defaults_of_transformers() -> None:
    """LLaVA-1.5's text_config names no sizes at all."""
    config = decoder_config({"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 64})
    assert (config.layers, config.hidden, config.vocab, config.context) == (32, 4096, 32064, 64)


def change_weights(folder: Path, edit: Any) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def q_proj(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))


def set_extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors[q_proj(tensors).replace("weight", "bias")] = torch.zeros(64)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({q_proj(t): torch.zeros(8, 8)}), r"q_proj\.weight has shape \(8, 8\) where .* \(64, 64\)"),
        (lambda t: t.update({q_proj(t): torch.zeros(64, 64, dtype=torch.int8)}), "stored as I8"),
        (lambda t: t.pop(q_proj(t)), r"no tensor model\.language_model\.layers\.1\.self_attn\.q_proj\.weight"),
        (lambda t: t.pop(next(n for n in t if "lm_head" in n)), r"no tensor lm_head\.weight"),
        (set_extra, r"q_proj\.bias that its config\.json does not explain"),
    ],
)
def test_weights_that_do_not_fit(edit: Any, message: str, tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    checkpoint = change_weights(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        export_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_unknown_precision(tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match="'int3': choose fp32 or int4"):
        export_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "out", "int3")


def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(TEXT["llama"], tmp_path)
    checkpoint = Checkpoint(tmp_path)
    add = WeightFile.add

    def full(self: WeightFile, name: str, array: np.ndarray) -> Any:
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, name, array)

    monkeypatch.setattr(WeightFile, "add", full)
    with pytest.raises(OSError, match="No space left"):
        export_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_and_tied_embeddings(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = make_model(config, tmp_path, tied=tied)
    model.to(dtype).save_pretrained(tmp_path)
    # the values of the half-precision file, computed with in float32 on both sides
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert ("lm_head.weight" in Checkpoint(tmp_path)) != tied
    session = load(tmp_path)
    table = np.load(tmp_path / "fp32" / "embed_tokens.npy", mmap_mode="r")
    assert isinstance(table, np.memmap)
    assert table.dtype == (np.float32 if dtype == torch.float32 else np.float16)
    np.testing.assert_allclose(table, model.get_input_embeddings().weight.detach().numpy(), atol=2.0**-25, rtol=0)
    embeds, positions = prompt(model, "original")
    tokens, ours = exported_greedy(session, table, embeds, positions, 8)
    expected, logits = reference_greedy(model, embeds, positions, 8)
    assert tokens == expected
    np.testing.assert_allclose(ours, logits, atol=2e-4 * np.abs(logits).max())


def test_a_bfloat16_table_beyond_the_range_of_float16_stays_float32(tmp_path: Path) -> None:
    model = make_model(TEXT["llama"], tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 5] = 1e6
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    load(tmp_path)
    table = np.load(tmp_path / "fp32" / "embed_tokens.npy")
    assert table.dtype == np.float32
    assert table[5, 5] > 9e5


@pytest.mark.parametrize(("generation", "expected"), [(None, [2]), ({"eos_token_id": [7, 9]}, [7, 9]), ({}, [2])])
def test_eos(generation: dict[str, Any] | None, expected: list[int], tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load(tmp_path).info.eos == expected


def test_info_and_files(tmp_path: Path) -> None:
    model = make_model(Qwen2Config(**SIZES), tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    before = Checkpoint(tmp_path).fingerprint()
    info = load(tmp_path).info
    assert Checkpoint(tmp_path).fingerprint() == before
    assert (info.file, info.embedding) == ("fp32/model.onnx", "fp32/embed_tokens.npy")
    assert (info.layers, info.kv_heads, info.head_dim, info.hidden) == (2, 2, 16, 64)
    assert (info.vocab, info.context, info.precision) == (90, 160, "fp32")
    assert {file.name for file in (tmp_path / "fp32").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "embed_tokens.npy",
    }
    graph = onnx.load(tmp_path / "fp32" / "model.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 18, "com.microsoft": 1}
    assert graph.ByteSize() < 100_000  # every weight is in the data file
    session = ort.InferenceSession(tmp_path / "fp32" / "model.onnx")
    assert [value.name for value in session.get_inputs()][:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert session.get_outputs()[0].shape == ["batch", 1, info.vocab]
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) > 0


def test_the_vision_tower_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(TEXT["llama"], tmp_path)
    read: list[str] = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    load(tmp_path)
    assert read
    assert not [name for name in read if "vision" in name or "projector" in name]
