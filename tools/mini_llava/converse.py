"""The later stages: teach the language model to answer from the vision tokens.

Small windows of the picture first: they are cheap, and enough to get the language model to look at the
picture at all. Full pictures after that. The dense targets of stage 1 stay as a second loss, so the tower
goes on learning from the same pictures.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tools.mini_llava.model import encode
from tools.mini_llava.pretrain import Batch, Heads, example_scene, window_of
from tools.mini_llava.text import BOS, USER, conversation, in_full_frame, questions


def example(
    seed: str, windows: tuple[int, ...], batch: int, tokenizer: str, turns: int, length: int
) -> dict[str, np.ndarray]:
    """A window with its dense targets, and a conversation of up to `turns` questions about it."""
    rng = random.Random(seed)
    window = window_of(seed, windows, batch)
    scene, row, column, out = example_scene(rng, window, label_share=0.7)
    reader = _reader(tokenizer)
    asked = questions(rng, in_full_frame(scene, row, column), turns)
    out["ids"], out["labels"] = conversation(reader, asked, length)
    return out


_READERS: dict[str, Tokenizer] = {}


def _reader(path: str) -> Tokenizer:
    if path not in _READERS:
        _READERS[path] = Tokenizer.from_file(path)
    return _READERS[path]


def loss(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    batch: Batch,
    *,
    tower: bool,
    dense_weight: float,
    start: tuple[int, int],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Next-token loss on the answers, plus `dense_weight` times the dense loss when the tower is trained.

    `start` holds the ids of the beginning-of-text and user tokens, which stand before the picture.
    """
    with torch.set_grad_enabled(tower):
        hidden = encode(model, batch["pixels"], batch["positions"])  # (B, 1 + T, D)
    vision = model.model.multi_modal_projector(hidden[:, 1:])  # (B, T, H)
    embed = model.model.language_model.embed_tokens
    first = embed(torch.tensor(start, device=vision.device)).expand(len(vision), -1, -1)
    sequence = torch.cat([first, vision, embed(batch["ids"])], 1)
    state = model.model.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
    labels = batch["labels"]
    predicting = state[:, -labels.shape[1] - 1 : -1]  # the position before each label
    wanted = labels != -100
    logits = model.lm_head(predicting[wanted])
    answer = F.cross_entropy(logits, labels[wanted])
    right = logits.argmax(-1) == labels[wanted]
    shown = {"answer": float(answer.detach()), "token": float(right.float().mean())}
    if not tower or dense_weight == 0:
        return answer, shown
    dense, more = heads(hidden, batch)
    return answer + dense_weight * dense, {**shown, **more}


def start_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    return tokenizer.token_to_id(BOS), tokenizer.token_to_id(USER)
