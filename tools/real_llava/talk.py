"""Stage 2: the language model learns to answer from the picture's tokens.

A step sees a window of a picture's tokens, whole and as they lie, so that no way of choosing tokens is favoured, and
asks several questions about what is in it. The questions do not see each other: each stands right after the picture,
as in use, and an answer cannot be read off the one before. Logits are taken at the answers alone.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from svdprune.calib.scenes import Scene, ask
from tools.real_llava.model import END, HEAD, QUESTION_END
from tools.real_llava.pictures import CANVAS, GRID, Picture, Store

# No `detail`: at this resolution a label's characters are as large as a patch.
KINDS = {"color": 2, "shape": 2, "count": 1, "existence": 2, "place": 2, "relation": 2}


@dataclass(frozen=True)
class Ask:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """Rows of the picture's tokens (T, D) float32, where each lies int64 (T,), and what is asked about them."""

    rows: torch.Tensor
    places: torch.Tensor
    asked: list[Ask]


def example(rng: random.Random, store: Store, number: int, window: int, turns: int) -> Example | None:
    """A window of `window` x `window` patches of a picture; None where none was found that cuts no object."""
    picture = store.pictures[number]
    owner = picture.owner.reshape(GRID, GRID)
    for _ in range(12):
        top, left = rng.randint(0, GRID - window), rng.randint(0, GRID - window)
        part = np.zeros_like(owner, bool)
        part[top : top + window, left : left + window] = True
        inside = [bool((owner[part] == i + 1).any()) for i in range(len(picture.objects))]
        whole = [not (owner[~part] == i + 1).any() for i in range(len(picture.objects))]
        if any(inside) and all(w or not i for i, w in zip(inside, whole, strict=True)):
            break
    else:
        return None
    seen = tuple(o for o, i in zip(picture.objects, inside, strict=True) if i)
    places = np.flatnonzero(part.ravel())
    rows = torch.from_numpy(store.features[number][places].astype(np.float32))
    asked = questions(rng, dataclasses.replace(picture, objects=seen), turns)
    return Example(rows, torch.from_numpy(places), asked)


def questions(rng: random.Random, picture: Picture, wanted: int) -> list[Ask]:
    """Up to `wanted` different questions: the picture's own, or what can be asked about its objects."""
    if picture.asked:
        chosen = rng.sample(picture.asked, min(wanted, len(picture.asked)))
        return [Ask(f"easy {'yes/no' if a in ('yes', 'no') else 'name'}", q, a) for q, a in chosen]
    scene = Scene(_blank(), picture.objects, np.zeros(0), np.zeros(0))
    found: dict[str, Ask] = {}
    for _ in range(4 * wanted):
        if len(found) == wanted:
            break
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if (q := ask(rng, scene, kind)) is not None:
            found.setdefault(q.text, Ask(kind, q.text, q.answer))
    return list(found.values())


@functools.cache
def _blank() -> Image.Image:
    return Image.new("RGB", (CANVAS, CANVAS))


@dataclass
class Batch:
    """Packed prompts: `ids` (B, N) with -1 where a picture's row stands, `positions` (B, N), `mask` (B, 1, N, N) to be
    added to the scores, and at `at` (M, 2) the rows that predict `labels` (M,); `group` (M,): which question."""

    ids: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    kinds: list[str]


def pack(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], spread: Sequence[bool]) -> Batch:
    """Examples of equally many tokens as one batch. `spread`: rows stand where they lie in the whole picture's prompt
    (`original` positions) instead of side by side."""
    head = _ids(tokenizer, HEAD)
    count = len(examples[0].rows)
    first = len(head) + count
    packed, at, labels, group, kinds = [], [], [], [], []
    for number, (one, apart) in enumerate(zip(examples, spread, strict=True)):
        steps = one.places.tolist() if apart else list(range(count))
        start = len(head) + (GRID * GRID if apart else count)  # where the text goes on
        ids = [*head, *[-1] * count]
        positions = [*range(len(head)), *(len(head) + s for s in steps)]
        turn = [0] * first  # 0: seen by all; then the question's number
        for place, q in enumerate(one.asked, 1):
            prompt = _ids(tokenizer, f"\n{q.text}{QUESTION_END}")
            answer = [*_ids(tokenizer, q.answer), _ids(tokenizer, END)[0]]
            for i, label in enumerate(answer):
                at.append((number, len(ids) + len(prompt) - 1 + i))
                labels.append(label)
                group.append(len(kinds))
            kinds.append(q.kind)
            body = [*prompt, *answer[:-1]]
            ids += body
            positions += range(start, start + len(body))
            turn += [place] * len(body)
        packed.append((ids, positions, turn))
    longest = max(len(ids) for ids, _, _ in packed)
    table = torch.zeros(3, len(packed), longest, dtype=torch.long)
    table[2] = -1
    for number, columns in enumerate(packed):
        for row, values in enumerate(columns):
            table[row, number, : len(values)] = torch.tensor(values)
    ids, positions, turn = table
    seen = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == 0)
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
    return Batch(
        ids,
        torch.stack([e.rows for e in examples]),
        positions,
        mask,
        torch.tensor(at),
        torch.tensor(labels),
        torch.tensor(group),
        kinds,
    )


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return _cached(tokenizer, text)


@functools.lru_cache(maxsize=4096)
def _cached(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """(M, vocabulary): what the model says at every place where an answer's token comes next."""
    inner = model.model
    embeds = inner.language_model.embed_tokens(batch.ids.clamp(min=0))
    embeds = embeds.masked_scatter((batch.ids < 0)[..., None], inner.multi_modal_projector(batch.rows))
    state = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(state[batch.at[:, 0], batch.at[:, 1]])


def loss_of(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Cross-entropy a question, and for each kind whether all of the answer's tokens were the likeliest."""
    size = torch.bincount(batch.group).float()
    each = F.cross_entropy(logits, batch.labels, reduction="none") / size[batch.group]
    wrong = torch.zeros(len(size)).index_add(0, batch.group, (logits.argmax(1) != batch.labels).float())
    right: dict[str, list[float]] = defaultdict(list)
    for kind, errors in zip(batch.kinds, wrong.tolist(), strict=True):
        right[kind].append(float(errors == 0))
    return each.sum() / len(size), dict(right)
