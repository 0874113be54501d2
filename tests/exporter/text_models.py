"""Random language models of the newer families, and transformers as the reference for any mask, without a cache.

The reference goes over all rows at each step under masks that transformers' own functions make, so that what a cache,
a window or a group hides or shows is that of one pass over everything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from tests.exporter.decoder_models import SIZES
from tests.exporter.text_configs import MODELS, Text


class Appends(Protocol):
    """A decoder's graph with its cache, driven by hand."""

    def start(self) -> None: ...

    def append(self, embeds: np.ndarray, positions: np.ndarray, **more: np.ndarray) -> np.ndarray: ...


@dataclass
class Reference:
    """All rows so far, and transformers' model over them."""

    model: Any
    head: torch.Tensor
    text: Text

    def start(self) -> None:
        self._embeds: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._levels: list[torch.Tensor] = []
        self._groups: list[torch.Tensor] = []

    @torch.no_grad()
    def append(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        deepstack: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `Session.append`: logits (V,) of the last row."""
        levels = self.text.export.get("deepstack", 0)
        nothing = np.zeros((levels, *embeds.shape), np.float32)
        self._embeds.append(torch.from_numpy(embeds))
        self._positions.append(torch.from_numpy(positions))
        self._levels.append(torch.from_numpy(nothing if deepstack is None else deepstack))
        self._groups.append(torch.from_numpy(np.full(len(embeds), -1) if groups is None else groups))
        rows, places = torch.cat(self._embeds)[None], torch.cat(self._positions, -1)[..., None, :]
        more: dict[str, Any] = {"attention_mask": torch.ones(rows.shape[:2], dtype=torch.long)}
        if levels:
            more["visual_pos_masks"] = torch.ones(rows.shape[:2], dtype=torch.bool)
            more["deepstack_visual_embeds"] = list(torch.cat(self._levels, 1))
        if "mask" in self.text.export:
            more["attention_mask"] = self._masks(rows, places, torch.cat(self._groups)[None])
        hidden = self.model(inputs_embeds=rows, position_ids=places, use_cache=False, **more).last_hidden_state
        logits: torch.Tensor = self.head @ hidden[0, -1]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return (logits if cap is None else torch.tanh(logits / cap) * cap).numpy()

    def _masks(self, rows: torch.Tensor, places: torch.Tensor, groups: torch.Tensor) -> Any:
        """As PaliGemma and Gemma 3 make them."""
        common: dict[str, Any] = {
            "config": self.model.config,
            "inputs_embeds": rows,
            "attention_mask": torch.ones(rows.shape[:2], dtype=torch.long),
            "past_key_values": None,
            "position_ids": places,
            "block_sequence_ids": groups,
        }
        if self.text.export["mask"] == "picture":
            return create_masks_for_vision_model(**common)
        full = create_causal_mask(**common)
        if getattr(self.model.config, "sliding_window", None) is None:
            return full
        return {"full_attention": full, "sliding_attention": create_sliding_window_causal_mask(**common)}


def make_text(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Reference:
    """A random language model of `MODELS` as a checkpoint in `folder`, and its reference."""
    return save_text(MODELS[name], folder, dtype)


def save_text(text: Text, folder: Path, dtype: torch.dtype = torch.float32) -> Reference:
    """A random model as a checkpoint of this dtype in `folder`; the reference has its values in float32."""
    torch.manual_seed(0)
    model = AutoModel.from_config(text.config, attn_implementation="eager").eval()
    tied = bool(getattr(text.config, "tie_word_embeddings", False))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part or part.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype).float())
        embedding = model.get_input_embeddings().weight
        head = embedding if tied else torch.randn_like(embedding).mul_(0.2).to(dtype).float()
    tensors = {f"model.language_model.{part}": value for part, value in model.state_dict().items()}
    if not tied:
        tensors["lm_head.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {part: value.detach().to(dtype).contiguous() for part, value in tensors.items()}, folder / "model.safetensors"
    )
    config = {"model_type": "any", "text_config": text.config.to_dict(), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Reference(model, head.detach(), text)


@dataclass(frozen=True)
class Run:
    """Rows given at once: embeddings (n, H), positions (n,) or (3, n), and what only some models take."""

    embeds: np.ndarray
    positions: np.ndarray
    more: dict[str, np.ndarray]


def runs(reference: Reference) -> list[Run]:
    """A prompt with a pruned picture in it, some text, and a second picture: positions have gaps."""
    random, text = np.random.default_rng(3), reference.text
    axes = 3 if "mrope_section" in (text.config.rope_parameters or {}) else 1
    whole = text.export.get("mask") == "prefix"
    found, start = [], 0
    for before, picture, after in ((4, 9, 5), (3, 0, 0), (2, 8, 3)):
        rows = before + picture + after
        grid = np.sort(random.choice(20, (3, picture)), -1) if picture else np.zeros((3, 0), int)
        behind = start + before + (20 if picture else 0)
        places = [np.tile(np.arange(start, start + before), (3, 1)), start + before + grid]
        places.append(np.tile(np.arange(behind, behind + after), (3, 1)))
        start = behind + after
        more: dict[str, np.ndarray] = {}
        seen = np.repeat([False, True, False], [before, picture, after])
        if "deepstack" in text.export:
            levels = random.normal(size=(text.export["deepstack"], rows, SIZES["hidden_size"]))
            more["deepstack"] = (levels * seen[:, None]).astype(np.float32)
        if "mask" in text.export and picture and not (whole and found):  # only a prompt's first run is a prefix
            more["groups"] = np.where(seen | whole, len(found), -1)
        embeds = random.normal(size=(rows, SIZES["hidden_size"])).astype(np.float32)
        found.append(Run(embeds, np.concatenate(places, -1)[:axes].squeeze(0 if axes == 1 else ()), more))
    return found


def play(session: Appends, given: list[Run], table: np.ndarray, tokens: list[int] | None = None, steps: int = 6) -> Any:
    """Each run, then as many steps after it: all tokens, and the logits (rows, V) that they are the largest of.

    tokens: these are fed, whatever the logits say.
    """
    session.start()
    said: list[int] = []
    rows: list[np.ndarray] = []
    for run in given:
        rows.append(session.append(run.embeds, run.positions, **run.more))
        last = run.positions[..., -1:]
        for step in range(1, steps + 1):
            said.append(int(rows[-1].argmax()))
            token = said[-1] if tokens is None else tokens[len(said) - 1]
            rows.append(session.append(table[[token]].astype(np.float32), last + step))
    return said, np.stack(rows)
