"""The decoder engine's graph built by TensorRT-RTX, which needs no GPU for it: parser and optimiser take the graph."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.static_export import export_engine_decoder
from tests.exporter.decoder_models import SIZES, TEXT, make_model
from tests.exporter.text_configs import REAL, TRUE
from tests.exporter.text_models import save_text

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine can be built without a GPU")

CACHE = 64
WHOLE = ((1, 16, CACHE),)  # rows of a run: least, best, most
DECODE, PREFILL = ((1, 1, 1),), ((2, 16, CACHE),)


@dataclass(frozen=True)
class Built:
    """What is looked at of a network and its engine: TensorRT's own objects do not outlive their builder."""

    kinds: list[Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    size: int


def build(graph: Path, profiles: tuple[tuple[int, int, int], ...]) -> Built:
    """An engine for an RTX 40; where there is none, the log is in the failure's message."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph)), log.lines
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    given = [network.get_input(i) for i in range(network.num_inputs)]
    varying = {tensor.name: tuple(tensor.shape) for tensor in given if -1 in tuple(tensor.shape)}
    for rows in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in varying.items():
            profile.set_shape(name, *(tuple(n if size == -1 else size for size in shape) for n in rows))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.lines
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return Built(
        [network.get_layer(i).type for i in range(network.num_layers)],
        {tensor.name: tensor.dtype for tensor in given},
        {tensor.name: tensor.dtype for tensor in outputs},
        plan.nbytes,
    )


def exported(folder: Path, cache: int = CACHE, **options: Any) -> Path:
    """The graph of the checkpoint in `folder`."""
    checkpoint = Checkpoint(folder)
    info = export_engine_decoder(checkpoint, checkpoint.config["text_config"], folder / "engine", cache, **options)
    return folder / info.file


@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads", "mistral", "qwen2", "qwen3"])
def test_every_shape_builds(name: str, tmp_path: Path) -> None:
    make_model(TEXT[name], tmp_path)
    built = build(exported(tmp_path), WHOLE)
    layers = SIZES["num_hidden_layers"]
    assert built.kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 2 * layers  # updated in place, not copied
    assert built.kinds.count(trt.LayerType.ROTARY_EMBEDDING) == 2 * layers
    assert built.kinds.count(trt.LayerType.ATTENTION_OUTPUT) == layers  # fused, not spelled out in products
    ends = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    assert built.inputs == {
        "inputs_embeds": trt.float32,
        "position_ids": trt.int64,
        "write_index": trt.int64,
        **{f"past.{end}": trt.float16 for end in ends},
    }
    assert built.outputs == {"logits": trt.float32, **{f"present.{end}": trt.float16 for end in ends}}


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_head_sizes_of_real_models_build(size: int, tmp_path: Path) -> None:
    """Some of them fail in TensorRT-RTX 1.7 where the mask gets its four dimensions after the comparison."""
    make_model(LlamaConfig(**SIZES, head_dim=size), tmp_path)
    build(exported(tmp_path), WHOLE)


@pytest.mark.parametrize("name", TRUE)
def test_newer_families_build_at_their_head_sizes(name: str, tmp_path: Path) -> None:
    """The engine's own attention, but for softcapped products, which it has not; caches are written in place."""
    text = TRUE[name]
    save_text(text, tmp_path)
    built = build(exported(tmp_path, **text.export), ((1, 16, CACHE), (1, 1, 2)))
    layers, capped = text.config.num_hidden_layers, name == "gemma2"
    assert built.kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 2 * layers
    assert built.kinds.count(trt.LayerType.ROTARY_EMBEDDING) == 2 * layers
    assert built.kinds.count(trt.LayerType.ATTENTION_OUTPUT) == (0 if capped else layers)
    assert ("deepstack" in built.inputs) == (name == "qwen3_vl")
    assert ("groups" in built.inputs) == (name in ("gemma", "gemma2", "gemma3"))


@pytest.mark.parametrize("profiles", [DECODE, PREFILL, DECODE + PREFILL], ids=["decode", "prefill", "both"])
def test_profiles_of_one_stage_build(profiles: tuple[tuple[int, int, int], ...], tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    build(exported(tmp_path), profiles)


SHAPES: dict[str, PretrainedConfig] = {
    "0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    ),
    "7B, grouped heads": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32064,
        max_position_embeddings=4096,
        sliding_window=None,
    ),
    "0.6B, normed heads": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_two_layers_of_real_models_build(name: str, tmp_path: Path, record_property: Any) -> None:
    """The engine is the weights and little else, whichever of one profile or two of the same range it has."""
    write_layers(SHAPES[name], tmp_path)
    graph = exported(tmp_path, cache=2048)
    weights = graph.with_name("engine.onnx.data").stat().st_size
    for profiles in (((1, 512, 2048),), ((1, 1, 2048), (1, 512, 2048))):
        size = build(graph, profiles).size
        record_property(f"bytes with {len(profiles)} profiles", size)
        assert size < 1.05 * weights + 16e6


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_two_layers_of_newer_models_build(name: str, tmp_path: Path, record_property: Any) -> None:
    save_text(REAL[name], tmp_path, torch.float16)
    graph = exported(tmp_path, cache=2048, **REAL[name].export)
    weights = graph.with_name("engine.onnx.data").stat().st_size
    size = build(graph, ((1, 512, 2048), (1, 1, 2048))).size
    record_property("bytes", size)
    assert size < 1.05 * weights + 16e6


def write_layers(text: PretrainedConfig, folder: Path) -> None:
    """A checkpoint of the language model alone, float16, norms of one: shapes are what counts."""
    generator = torch.Generator().manual_seed(0)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    wide, narrow = text.num_attention_heads * size, text.num_key_value_heads * size
    hidden, inner, root = text.hidden_size, text.intermediate_size, "model.language_model"
    shapes: dict[str, tuple[int, ...]] = {f"{root}.embed_tokens.weight": (text.vocab_size, hidden)}
    shapes[f"{root}.norm.weight"] = (hidden,)
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, hidden)
    for i in range(text.num_hidden_layers):
        layer = f"{root}.layers.{i}"
        heads = {"q_proj": (wide, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
        shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in heads.items()}
        if text.model_type == "qwen2":
            shapes |= {f"{layer}.self_attn.{name}.bias": shape[:1] for name, shape in heads.items()}
        if text.model_type == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, wide)
        shapes |= {f"{layer}.mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = {
        name: torch.ones(shape, dtype=torch.float16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).half()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llava", "text_config": text.to_dict(), "tie_word_embeddings": text.tie_word_embeddings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
