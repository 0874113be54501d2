"""The loop of stage 2: windows that grow, low-rank updates and the projector, states to go on from."""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tools.real_llava.lora import lora_parameters
from tools.real_llava.pictures import GRID, Store
from tools.real_llava.talk import Example, answer_logits, example, loss_of, pack

HELD_OUT = 40  # the first pictures of a store are never trained on
TURNS = 8  # questions about a window
SAVE_EVERY = 10
PROJECTOR_SHARE = 0.3  # of the rate: it starts from stage 1, the updates from nothing


@dataclass(frozen=True)
class Stage:
    """`steps` updates on `batch` windows of `window` patches a side."""

    window: int
    batch: int
    steps: int


STAGES = (Stage(8, 4, 50), Stage(11, 3, 15), Stage(GRID, 2, 35))


def plan(stages: tuple[Stage, ...]) -> list[Stage]:
    """The stage of every step."""
    return [stage for stage in stages for _ in range(stage.steps)]


def examples(store: Store, seed: str, window: int, count: int, start: int) -> Iterator[Example]:
    """`count` windows of pictures in turn, from number `start` on."""
    given, number = 0, start
    while given < count:
        rng = random.Random(f"{seed}:{number}")
        picture = HELD_OUT + number % (store.done - HELD_OUT)
        number += 1
        found = example(rng, store, picture, window, TURNS)
        if found is not None and found.asked:
            given += 1
            yield found


def talk(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    store: Store,
    state: Path,
    *,
    stages: tuple[Stage, ...] = STAGES,
    rate: float = 1e-3,
    minutes: float = float("inf"),
    report: Callable[[str], None] = print,
) -> int:
    """Train `model`, which has its low-rank updates in place, going on from `state`; the steps that are done.

    The rate rises over 20 steps and falls linearly to nothing over the last two thirds. It stops early after `minutes`,
    the state saved.
    """
    projector = model.model.multi_modal_projector
    updates = lora_parameters(model.model.language_model)
    for p in model.parameters():
        p.requires_grad_(False)
    groups = [
        {"params": list(updates.values()), "share": 1.0},
        {"params": list(projector.parameters()), "share": PROJECTOR_SHARE},
    ]
    trained: list[nn.Parameter] = [p for g in groups for p in g["params"]]  # type: ignore[attr-defined]
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), weight_decay=0.0)
    done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for p, value in zip(trained, saved["trained"], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    steps = plan(stages)
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic()
    while done < len(steps) and time.monotonic() - began < 60 * minutes:
        stage = steps[done]
        factor = min(1.0, (done + 1) / 20, (len(steps) - done) / (0.67 * len(steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor * group["share"]
        used = sum(s.batch for s in steps[:done])
        chosen = list(examples(store, f"talk:{done}", stage.window, stage.batch, used))
        batch = pack(tokenizer, chosen, [(done + i) % 2 == 0 for i in range(stage.batch)])
        loss, right = loss_of(answer_logits(model, batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        done += 1
        seen["loss"].append(float(loss.detach()))
        for kind, values in right.items():
            seen[kind] += values
        if done % SAVE_EVERY == 0 or done == len(steps):
            shown = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(seen.items()))
            report(f"talk {done}/{len(steps)} window {stage.window} {(time.monotonic() - began) / 60:.1f} min {shown}")
            seen.clear()
            save(state, done, trained, optimizer)
    save(state, done, trained, optimizer)
    return done


def save(state: Path, done: int, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    beside = state.with_suffix(".partial")
    torch.save(
        {"step": done, "trained": [p.detach() for p in trained], "optimizer": optimizer.state_dict()},
        beside,
    )
    os.replace(beside, state)
