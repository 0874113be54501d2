"""The decoders of the newer families, both spellings, against transformers: positions of three axes, DeepStack, groups.

Each is given a prompt with a picture, decodes, is given text, decodes, a second picture, decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import Gemma3TextConfig

from svdprune.exporter.decoder.quantise import quantise
from svdprune.exporter.rules import DECODER_OPERATORS, check_target, releases_with
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.targets import TARGETS
from tests.exporter.decoder_models import SIZES, Session, load, more_feeds
from tests.exporter.static_models import load_static
from tests.exporter.text_configs import MODELS, Text
from tests.exporter.text_models import Reference, Run, make_text, play, runs, save_text

CACHE = 72


def open_graph(spelling: str, folder: Path, reference: Reference, precision: str = "fp32") -> Any:
    if spelling == "static":
        return load_static(folder, precision, CACHE, **reference.text.export)
    return load(folder, precision, **reference.text.export)


def table_of(reference: Reference) -> np.ndarray:
    """The embeddings as transformers gives them: scaled where the model scales them."""
    embedding = reference.model.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    rows: np.ndarray = embedding.weight.detach().numpy() * np.float32(scale)
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = make_text(name, tmp_path)
    given, table = runs(reference), table_of(reference)
    expected, logits = play(reference, given, table)
    for spelling in ("onnxruntime", "static"):
        tokens, ours = play(open_graph(spelling, tmp_path, reference), given, table)
        assert tokens == expected, spelling
        np.testing.assert_allclose(ours, logits, atol=1e-4 * np.abs(logits).max(), err_msg=spelling)


def without(run: Run, name: str) -> Run:
    return Run(run.embeds, run.positions, {key: value for key, value in run.more.items() if key != name})


def flat(run: Run) -> Run:
    """Each row's time on all axes."""
    return Run(run.embeds, np.tile(run.positions[:1], (3, 1)), run.more)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2_5_vl", flat),
        ("qwen3_vl", flat),
        ("qwen3_vl", lambda run: without(run, "deepstack")),
        ("gemma", lambda run: without(run, "groups")),
        ("gemma2", lambda run: without(run, "groups")),
        ("gemma3", lambda run: without(run, "groups")),
    ],
)
def test_each_input_matters(name: str, change: Any, tmp_path: Path) -> None:
    """The parity above could not fail if a graph and the reference both let an input drop."""
    reference = make_text(name, tmp_path)
    first = runs(reference)[0]
    for spelling in ("onnxruntime", "static"):
        session = open_graph(spelling, tmp_path, reference)
        results = []
        for run in (first, change(first)):
            session.start()
            results.append(session.append(run.embeds, run.positions, **run.more))
        assert np.abs(results[0] - results[1]).max() > 0.02 * np.abs(results[0]).max(), spelling


@pytest.mark.parametrize("name", MODELS)
def test_float16_follows_the_float32_model(name: str, tmp_path: Path) -> None:
    """The very graph that engines are built from; the weights are float16's, so that only the arithmetic differs."""
    reference = make_text(name, tmp_path, torch.float16)
    given, table = runs(reference), table_of(reference)
    tokens, logits = play(reference, given, table)
    _, ours = play(open_graph("static", tmp_path, reference, "fp16"), given, table, tokens)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, logits, atol=0.015 * np.abs(logits).max())


@pytest.mark.parametrize("name", MODELS)
def test_the_static_check_takes_the_graph_for_engines(name: str, tmp_path: Path) -> None:
    reference, target = make_text(name, tmp_path), TARGETS["jetson-thor"]
    open_graph("static", tmp_path, reference, "fp16")
    releases = releases_with(target, DECODER_OPERATORS)
    found = check_target(tmp_path / "engine" / "engine.onnx", target, releases)
    assert found
    assert not any(found.values()), found


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma2", "gemma3"])
def test_int4_is_near_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    reference = make_text(name, tmp_path)
    given, table = runs(reference), table_of(reference)
    tokens, full = play(reference, given, table)
    session = open_graph("onnxruntime", tmp_path, reference, "int4")
    with torch.no_grad():
        for module in reference.model.modules():
            if isinstance(module, torch.nn.Linear):
                codes = quantise(module.weight.numpy(), 4)
                module.weight.copy_(torch.from_numpy(codes.dequantise(module.in_features)))
        reference.head = torch.from_numpy(quantise(reference.head.numpy(), 8).dequantise(reference.head.shape[1]))
    _, expected = play(reference, given, table, tokens)
    _, ours = play(session, given, table, tokens)
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    assert error < 0.06
    assert np.linalg.norm(full - expected) > 2 * np.linalg.norm(ours - expected)  # not simply the full weights


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma2", "gemma3"])
def test_one_buffer_can_be_past_and_present(name: str, tmp_path: Path) -> None:
    """`kv_cache: shared`: the cache is written in place, and rows behind are neither read nor written."""
    reference = make_text(name, tmp_path)
    session = open_graph("onnxruntime", tmp_path, reference)
    assert session.info.kv_cache == "shared"
    given, table = runs(reference), table_of(reference)
    tokens, expected = play(session, given, table)
    shared = SharedBuffers(session, 80)
    said, ours = play(shared, given, table)
    assert said == tokens
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    for buffer, before, grown in zip(shared.buffers.values(), shared.before, session.cache, strict=True):
        np.testing.assert_allclose(buffer.numpy()[:, :, : shared.length], grown, atol=1e-4)
        np.testing.assert_array_equal(buffer.numpy()[:, :, shared.length :], before[:, :, shared.length :])


@dataclass
class SharedBuffers:
    """`Session` with one buffer of `capacity` rows bound as both past and present, filled with garbage at first."""

    graph: Session
    capacity: int
    buffers: dict[str, ort.OrtValue] = field(default_factory=dict)
    before: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def start(self) -> None:
        info, random = self.graph.info, np.random.default_rng(0)
        names = [f"{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
        shape = (1, info.kv_heads, self.capacity, info.head_dim)
        self.before = [random.normal(size=shape).astype(np.float32) for _ in names]
        arrays = zip(names, self.before, strict=True)
        self.buffers = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in arrays}
        self.length = 0

    def append(self, embeds: np.ndarray, positions: np.ndarray, **more: np.ndarray) -> np.ndarray:
        binding, info = self.graph.session.io_binding(), self.graph.info
        self.length += len(embeds)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None]))
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[..., None, :]))
        for name, array in more_feeds(info.deepstack, info.mask, embeds, **more).items():
            binding.bind_cpu_input(name, array)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits")
        self.graph.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()[0, 0]  # in the order of binding
        return logits


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma2", "gemma3"])
def test_a_batch_is_its_sequences(name: str, tmp_path: Path) -> None:
    """Two sequences of one length, with positions, features and groups of their own, in one run."""
    reference = make_text(name, tmp_path)
    session = open_graph("onnxruntime", tmp_path, reference)
    one = runs(reference)[0]
    random = np.random.default_rng(9)
    more = {key: random.permutation(value, axis=-1) for key, value in one.more.items() if key != "groups"}
    if "groups" in one.more:
        more["groups"] = np.where(np.arange(len(one.embeds)) < 7, 0, -1)
    other = Run(one.embeds[::-1].copy(), one.positions + 2, more)
    alone = []
    for run in (one, other):
        session.start()
        alone.append(session.append(run.embeds, run.positions, **run.more))
    empty = np.zeros((2, session.info.kv_heads, 0, session.info.head_dim), np.float32)
    feeds = {
        "inputs_embeds": np.stack([one.embeds, other.embeds]),
        "attention_mask": np.ones((2, len(one.embeds)), np.int64),
        "position_ids": np.stack([one.positions, other.positions], -2),
        **{f"past_key_values.{i}.{part}": empty for i in range(session.info.layers) for part in ("key", "value")},
    }
    if session.info.deepstack:
        feeds["deepstack"] = np.stack([one.more["deepstack"], other.more["deepstack"]], 1)
    if session.info.mask != "causal":
        feeds["groups"] = np.stack([one.more["groups"], other.more["groups"]])
    together = session.session.run(["logits"], feeds)[0][:, 0]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4 * np.abs(together).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_embeddings_are_those_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a half-precision checkpoint, too: the table is not scaled, its rows are when they are read."""
    config = Gemma3TextConfig(**SIZES | {"hidden_size": 56, "head_dim": 16})  # float16 does not hold 56 ** 0.5
    reference = save_text(Text(config, {"mask": "picture"}), tmp_path, dtype)
    info = load(tmp_path, mask="picture").info
    path = tmp_path / info.embedding
    assert np.load(path, mmap_mode="r").dtype == np.float16
    ids = torch.arange(SIZES["vocab_size"])
    with torch.no_grad():
        wanted = reference.model.get_input_embeddings()(ids).numpy()
    ours = Embedding(path, info.vocab, info.hidden, info.embed_scale)(ids.tolist())
    np.testing.assert_allclose(ours, wanted, atol=2.0**-22, rtol=0)
