"""Random LLaVA checkpoints, the exported decoder driven by hand, and transformers as the reference for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
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
    "mistral-window": MistralConfig(**SIZES, sliding_window=7),
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

    def append(self, embeds: np.ndarray, positions: np.ndarray, **more: np.ndarray) -> np.ndarray:
        """Rows (n, H) at positions (n,) or (3, n); more: what `more_feeds` takes."""
        total = self.cache[0].shape[2] + len(embeds)
        feeds = {
            "inputs_embeds": embeds[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": positions[..., None, :],
            **more_feeds(self.info.deepstack, self.info.mask, embeds, **more),
        }
        names = [f"past_key_values.{i}.{part}" for i in range(self.info.layers) for part in ("key", "value")]
        logits, *self.cache = self.session.run(None, feeds | dict(zip(names, self.cache, strict=True)))
        return logits[0, 0]


def more_feeds(
    levels: int, mask: str, embeds: np.ndarray, deepstack: np.ndarray | None = None, groups: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The inputs that only some graphs have: features (L, n, H), by default zeros; groups (n,), by default none."""
    feeds: dict[str, np.ndarray] = {}
    if levels:
        rows = np.zeros((levels, *embeds.shape)) if deepstack is None else deepstack
        feeds["deepstack"] = np.ascontiguousarray(rows[:, None], np.float32)
    if mask != "causal":
        feeds["groups"] = np.full((1, len(embeds)), -1) if groups is None else groups[None].astype(np.int64)
    return feeds


def load(folder: Path, precision: str = "fp32", **options: Any) -> Session:
    checkpoint = Checkpoint(folder)
    info = export_decoder(checkpoint, checkpoint.config["text_config"], folder / precision, precision, **options)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return Session(info, ort.InferenceSession(folder / precision / "model.onnx", settings))


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
