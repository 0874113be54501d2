"""The exported decoder against transformers: same logits and greedy tokens, with and without gaps in the positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder import DecoderInfo, export_decoder

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,  # ten times the usual: logits far apart, so that a wrong one shows
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40}
TEXT: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-all-heads": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama-one-layer": LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
    "llama-biases-wide-heads": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=32),
    "llama-rope-linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama-rope-llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-rope-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
}
PROMPT, IMAGE_AT, TOKENS, KEPT = 19, 4, 30, (2, 3, 7, 11, 20, 29)  # text rows; 6 of 30 vision rows kept


def make_model(text: PretrainedConfig, folder: Path, seed: int = 0, tied: bool = False, **save: Any) -> Any:
    """A random LLaVA saved to `folder`; norms and biases are moved off their ones and zeros, so that they count."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return model


@dataclass
class Session:
    """The exported graph driven as the runtime drives it: rows appended to a cache that each run returns longer."""

    info: DecoderInfo
    session: ort.InferenceSession

    def start(self) -> None:
        empty = np.zeros((1, self.info.kv_heads, 0, self.info.head_dim), np.float32)
        self.cache = [empty] * (2 * self.info.layers)

    def append(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        total = self.cache[0].shape[2] + len(embeds)
        feeds = {
            "inputs_embeds": embeds[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": positions[None],
        }
        names = [f"past_key_values.{i}.{part}" for i in range(self.info.layers) for part in ("key", "value")]
        logits, *self.cache = self.session.run(None, feeds | dict(zip(names, self.cache, strict=True)))
        return logits[0, 0]


def load(folder: Path, precision: str = "fp32") -> Session:
    checkpoint = Checkpoint(folder)
    info = export_decoder(checkpoint, checkpoint.config["text_config"], folder / precision, precision)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return Session(info, ort.InferenceSession(folder / precision / "model.onnx", options))


def prompt(model: Any, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (n, H) of a text with a pruned picture in it, and their positions under a policy."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(4, SIZES["vocab_size"], (PROMPT,), generator=generator)
    rows = model.get_input_embeddings()(text).detach()
    features = torch.randn(len(KEPT), SIZES["hidden_size"], generator=generator) * rows.std()
    embeds = torch.cat([rows[:IMAGE_AT], features, rows[IMAGE_AT:]])
    if policy == "compact":
        return embeds, torch.arange(len(embeds))
    vision, after = IMAGE_AT + torch.tensor(KEPT), IMAGE_AT + TOKENS + torch.arange(PROMPT - IMAGE_AT)
    return embeds, torch.cat([torch.arange(IMAGE_AT), vision, after])


@torch.no_grad()
def reference_greedy(
    model: Any, embeds: torch.Tensor, positions: torch.Tensor, steps: int
) -> tuple[list[int], np.ndarray]:
    """Tokens, and logits (steps, V), of transformers with its own cache and an all-ones mask."""
    cache, tokens, rows = None, [], []
    for _ in range(steps):
        total = len(embeds) + (0 if cache is None else cache.get_seq_length())
        out = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, total, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = model.lm_head(out.last_hidden_state[0, -1])
        tokens.append(int(logits.argmax()))
        rows.append(logits.numpy())
        embeds, positions = model.get_input_embeddings()(torch.tensor(tokens[-1:])), positions[-1:] + 1
    return tokens, np.stack(rows)


def exported_greedy(session: Session, table: np.ndarray, embeds: Any, positions: Any, steps: int) -> Any:
    session.start()
    tokens, rows = [], []
    embeds, positions = embeds.numpy(), positions.numpy()
    for _ in range(steps):
        rows.append(session.append(embeds, positions))
        tokens.append(int(rows[-1].argmax()))
        embeds, positions = table[tokens[-1:]].astype(np.float32), positions[-1:] + 1
    return tokens, np.stack(rows)


@pytest.mark.parametrize("name", TEXT)
def test_greedy_tokens_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(TEXT[name], tmp_path)
    session = load(tmp_path)
    table = np.load(tmp_path / "fp32" / "embed_tokens.npy", mmap_mode="r")
    for policy in ("compact", "original"):
        embeds, positions = prompt(model, policy)
        expected, logits = reference_greedy(model, embeds, positions, 24)
        tokens, ours = exported_greedy(session, table, embeds, positions, 24)
        assert tokens == expected
        np.testing.assert_allclose(ours, logits, atol=2e-4 * np.abs(logits).max())


def test_positions_matter(tmp_path: Path) -> None:
    """The check above could not fail if the graph ignored positions and the policies agreed by chance."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    session.start()
    compact = session.append(*(part.numpy() for part in prompt(model, "compact")))
    session.start()
    original = session.append(*(part.numpy() for part in prompt(model, "original")))
    assert np.abs(compact - original).max() > 0.05 * np.abs(compact).max()


def test_appending_in_pieces_equals_appending_at_once(tmp_path: Path) -> None:
    """A second question of a chat appends several rows to a cache that is not empty."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    session.start()
    once = session.append(embeds, positions)
    cache = session.cache
    session.start()
    for cut in ((0, 7), (7, 8), (8, len(embeds))):
        pieces = session.append(embeds[slice(*cut)], positions[slice(*cut)])
    np.testing.assert_allclose(pieces, once, atol=1e-4 * np.abs(once).max())
    for ours, theirs in zip(session.cache, cache, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_one_buffer_can_be_past_and_present(precision: str, tmp_path: Path) -> None:
    """What `kv_cache: shared` promises: a preallocated buffer, bound as both, is written in place."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path, precision)
    info = session.info
    assert info.kv_cache == "shared"
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    shape = (1, info.kv_heads, 64, info.head_dim)
    names = [f"{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
    garbage = np.random.default_rng(0).normal(size=shape).astype(np.float32)  # unused rows must not be read
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(garbage.copy()) for name in names}
    session.start()
    total = 0
    for cut in ((0, 10), (10, 11), (11, 12), (12, len(embeds))):
        rows, places = embeds[slice(*cut)], positions[slice(*cut)]
        expected = session.append(rows, places)
        total += len(rows)
        binding = session.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", rows[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", places[None])
        for name in names:
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffers[name])
            binding.bind_ortvalue_output(f"present.{name}", buffers[name])
        binding.bind_output("logits")
        session.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()[0, 0]  # in the order of binding
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    for name, grown in zip(names, session.cache, strict=True):
        buffer = buffers[name].numpy()
        np.testing.assert_allclose(buffer[:, :, :total], grown, atol=1e-4)
        np.testing.assert_array_equal(buffer[:, :, total:], garbage[:, :, total:])


def test_positions_beyond_the_context_are_refused(tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    session.start()
    one = np.zeros((1, SIZES["hidden_size"]), np.float32)
    session.append(one, np.array([session.info.context - 1]))
    session.start()
    with pytest.raises(Exception, match="position"):
        session.append(one, np.array([session.info.context]))
