"""Stage 1, without the language model: the projector says at every patch, in word embeddings, what object is there.

A patch's target is the sum of the input embeddings of its object's colour and shape and, at less weight, of the row
and column of the picture's ninths its object is in; a patch of the background says so and where it is itself. Then the
language model finds words it knows where the picture's tokens stand, and stage 2 has to teach it only to use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from svdprune.calib.scenes import COLORS, SHAPES
from svdprune.calib.scenes.questions import COLUMNS, ROWS
from tools.real_llava.pictures import CANVAS, GRID, Picture, Store

PLACE_WEIGHT = 0.5
BACKGROUND = "background"
WORDS = {  # of each group a patch has exactly one
    "color": (BACKGROUND, *COLORS, "gray", "teal", "brown"),
    "shape": (BACKGROUND, *SHAPES, "rectangle"),
    "row": ROWS,
    "column": COLUMNS,
}
TEMPERATURE = 0.1


def word_embeddings(table: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """(words, H) of each group: the mean embedding of the tokens of the word with a space before it."""
    found = {}
    for group, words in WORDS.items():
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        found[group] = torch.stack([table[i].mean(0) for i in ids]).detach()
    return found


def targets(picture: Picture) -> np.ndarray:
    """int64 (GRID * GRID, 4), a word of each group; -1 on the patches of edges and of objects not known."""
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    out = np.stack([np.zeros_like(row), np.zeros_like(row), 3 * row // GRID, 3 * column // GRID], 1)
    for number, item in enumerate(picture.objects, 1):
        if not item.shape or not item.color:  # no question of this picture tells
            out[picture.owner == number] = -1
            continue
        place = (min(2, int(3 * item.y / CANVAS)), min(2, int(3 * item.x / CANVAS)))
        out[picture.owner == number] = (
            WORDS["color"].index(item.color),
            WORDS["shape"].index(item.shape),
            *place,
        )
    out[picture.owner < 0] = -1
    return out


def loss_of(
    rows: torch.Tensor, wanted: torch.Tensor, words: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Distance to the target and, for each group, the entropy of which word's direction is nearest.

    rows (N, H), wanted int64 (N, 4).
    """
    scale = {g: PLACE_WEIGHT if g in ("row", "column") else 1.0 for g in words}
    goal = sum(scale[g] * words[g][wanted[:, i]] for i, g in enumerate(words))
    size = goal.pow(2).mean()
    loss = (rows - goal).pow(2).mean() / size
    shown = {"distance": float(loss.detach())}
    on = wanted[:, 0] > 0
    for i, (group, table) in enumerate(words.items()):
        centred = table - table.mean(0)
        logits = rows @ F.normalize(centred, dim=1).T / (TEMPERATURE * size.sqrt() * rows.shape[1] ** 0.5)
        weight = torch.where(on, 1.0, 0.25)
        loss = loss + 0.25 * (weight * F.cross_entropy(logits, wanted[:, i], reduction="none")).mean()
        right = logits.argmax(1) == wanted[:, i]
        shown[group] = float(right[on].float().mean())
    shown["background"] = float((logits_background(rows, words) == (wanted[:, 0] == 0)).float().mean())
    return loss, shown


def logits_background(rows: torch.Tensor, words: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool (N,): where the nearest colour is none."""
    table = words["color"]
    return (rows @ F.normalize(table - table.mean(0), dim=1).T).argmax(1) == 0


def gather(store: Store, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and targets (N, 4) of the patches of these pictures that are not on edges."""
    wanted = np.concatenate([targets(store.pictures[i]) for i in numbers])
    kept = wanted[:, 0] >= 0
    rows = np.concatenate([store.features[i] for i in numbers])[kept]
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(wanted[kept])


def align(
    projector: nn.Module,
    store: Store,
    words: dict[str, torch.Tensor],
    *,
    steps: int,
    held_out: int = 40,
    batch: int = 2048,
    rate: float = 2e-3,
    report: object = print,
    seed: int = 0,
) -> dict[str, float]:
    """Train the projector on the patches that have features; returns what it does on pictures it did not see."""
    rows, wanted = gather(store, range(held_out, store.done))
    seen = gather(store, range(held_out))
    generator = torch.Generator().manual_seed(seed)
    chance = torch.where(wanted[:, 0] > 0, 1.0, float((wanted[:, 0] > 0).float().mean()))  # objects as often as not
    optimizer = torch.optim.AdamW(projector.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    shown: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, (steps - step) / (0.7 * steps))
        pick = torch.multinomial(chance, batch, generator=generator)
        loss, _ = loss_of(projector(rows[pick]), wanted[pick], words)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                _, shown = loss_of(projector(seen[0]), seen[1], words)
            report(f"align {step + 1}/{steps} " + " ".join(f"{k} {v:.3f}" for k, v in shown.items()))  # type: ignore[operator]
    return shown
