"""What the language model says about a picture from some of its tokens, against what it says from all of them.

Greedy decoding gives exactly a certain answer if and only if, fed that answer, the model's likeliest next token is each
time the answer's own: so one pass over prompt and unpruned answer tells whether a pruned picture gets the same, how far
it follows, and the first token's distribution. Only where it departs, and a label asks for its words, is text
generated. The keys and values of the picture are computed once for all questions about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from svdprune.calib.statistics import kl_divergence
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.seen import View
from svdprune.runtime.positions import Layout, picture_place


@dataclass(frozen=True)
class Said:
    """An answer: its ids, the end token included, and log-probabilities float32 (V,) of the first token."""

    ids: list[int]
    first: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """How one view answers one question.

    `matched`: the reference's tokens before the first that differs. `kl`: of the first token, nats, from the reference.
    `ids`: the answer, None where it differs and was not asked for.
    """

    matched: int
    same: bool
    kl: float
    ids: list[int] | None


class Judge:
    """Asks views of one picture.

    Args:
        limit: the most tokens of an answer.
        batch: rows (views x questions) that go through the language model at once.
    """

    def __init__(self, model: Model, limit: int = 32, batch: int = 64) -> None:
        self.model, self.limit, self.batch = model, limit, batch

    @torch.no_grad()
    def listen(self, view: View, prompts: Sequence[list[int]]) -> list[Said]:
        """The greedy answers to questions about one view."""
        said: dict[int, Said] = {}
        for group in self._groups(prompts):
            asked = [prompts[q] for q in group]
            rows = _Rows(self.model, [view], asked)
            rests = [ids[rows.place + 1 :] for ids in asked]
            logits = self.model.head(_last(rows.feed(rests), rests)).float()  # (Q, V)
            begun = [[int(token)] for token in logits.argmax(-1)]
            answers = self._finish(rows, begun, begun)
            first = logits.log_softmax(-1).cpu().numpy()
            said.update((q, Said(ids, log)) for q, ids, log in zip(group, answers, first, strict=True))
        return [said[q] for q in range(len(prompts))]

    @torch.no_grad()
    def compare(
        self, views: Sequence[View], prompts: Sequence[list[int]], references: Sequence[Said], wanted: Sequence[bool]
    ) -> list[list[Verdict]]:
        """For each view, a verdict on each question; `wanted`: questions whose answers are asked for."""
        found: list[dict[int, Verdict]] = [{} for _ in views]
        for group in self._groups(prompts):
            size = max(1, self.batch // len(group))
            for start in range(0, len(views), size):
                some = views[start : start + size]
                asked, theirs = [prompts[q] for q in group], [references[q] for q in group]
                verdicts = self._compare(some, asked, theirs, [wanted[q] for q in group])
                for place, verdict in enumerate(verdicts):
                    found[start + place // len(group)][group[place % len(group)]] = verdict
        return [[one[q] for q in range(len(prompts))] for one in found]

    def _compare(
        self, views: Sequence[View], prompts: Sequence[list[int]], references: Sequence[Said], wanted: Sequence[bool]
    ) -> list[Verdict]:
        """Verdicts in the order of the rows: all questions of the first view, then those of the next."""
        rows = _Rows(self.model, views, prompts)
        rests = [ids[rows.place + 1 :] for ids in prompts] * len(views)
        theirs, asked = list(references) * len(views), list(wanted) * len(views)
        hidden = rows.feed([rest + said.ids[:-1] for rest, said in zip(rests, theirs, strict=True)])
        spans = [
            state[len(rest) - 1 : len(rest) - 1 + len(said.ids)]
            for state, rest, said in zip(hidden, rests, theirs, strict=True)
        ]
        logits = self.model.head(torch.cat(spans)).float()  # (all answers' tokens, V)
        starts = np.cumsum([0, *(len(said.ids) for said in theirs)])
        likeliest = logits.argmax(-1).tolist()
        first = logits[starts[:-1]].log_softmax(-1).cpu().numpy()
        kl = kl_divergence(np.stack([said.first for said in theirs]), first)
        matched, answers = [], []
        for said, start, stop in zip(theirs, starts[:-1], starts[1:], strict=True):
            mine = likeliest[start:stop]
            same = next((n for n, (a, b) in enumerate(zip(mine, said.ids, strict=True)) if a != b), len(mine))
            matched.append(same)
            answers.append(mine[: same + 1])  # all of it, or up to and with the token that departs
        left = [n for n, said in enumerate(theirs) if asked[n] and matched[n] < len(said.ids)]
        if left:
            rows.rewind(left)
            begun = [answers[n] for n in left]
            fresh = [rests[n] + answers[n] for n in left]
            for n, ids in zip(left, self._finish(rows, begun, fresh), strict=True):
                answers[n] = ids
        return [
            Verdict(
                matched[n],
                whole := matched[n] == len(said.ids),
                float(kl[n]),
                answers[n] if whole or asked[n] else None,
            )
            for n, said in enumerate(theirs)
        ]

    def _finish(self, rows: _Rows, begun: Sequence[list[int]], fresh: Sequence[list[int]]) -> list[list[int]]:
        """Answers that have begun, to their end. fresh: ids of each row that are not in the cache yet."""
        answers = [list(ids) for ids in begun]
        while any(not self._ended(ids) for ids in answers):
            tokens = self.model.head(_last(rows.feed(fresh), fresh)).argmax(-1).tolist()
            for ids, token in zip(answers, tokens, strict=True):
                if not self._ended(ids):
                    ids.append(token)
            fresh = [[ids[-1]] for ids in answers]  # a row that has ended goes along and is not read
        return answers

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1] in self.model.eos or len(ids) >= self.limit

    def _groups(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Questions whose prompts are the same up to the picture, which share its place in the cache."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for q, ids in enumerate(prompts):
            groups.setdefault(tuple(ids[: picture_place(ids, self.model.text.image_token_id)]), []).append(q)
        return [group[n : n + self.batch] for group in groups.values() for n in range(0, len(group), self.batch)]


class _Rows:
    """The language model with the picture in its cache: one row for each view and question, views outermost."""

    _cache: Any = None

    def __init__(self, model: Model, views: Sequence[View], prompts: Sequence[list[int]]) -> None:
        self._model = model
        self.place = picture_place(prompts[0], model.text.image_token_id)
        layouts = [Layout((self.place,), (view.span,), view.positions, model.axes) for view in views]
        before = model.embed(prompts[0][: self.place])
        longest = max(len(view.rows) for view in views)
        self._picture = self.place + longest
        embeds = before.new_zeros(len(views), self._picture, before.shape[1])
        self._mask = torch.zeros(embeds.shape[:2], dtype=torch.long, device=model.device)
        positions = np.zeros((model.axes, *self._mask.shape), np.int64)
        for number, (view, layout) in enumerate(zip(views, layouts, strict=True)):
            count = self.place + len(view.rows)  # shorter ones are padded at the end
            embeds[number, :count] = torch.cat([before, view.rows])
            self._mask[number, :count] = 1
            positions[:, number, :count] = layout.span(0, self.place + 1)
        self._run(embeds, torch.from_numpy(positions).to(model.device))
        self._cache.batch_repeat_interleave(len(prompts))
        self._mask = self._mask.repeat_interleave(len(prompts), 0)
        after = torch.tensor([layout.position(self.place + 1) for layout in layouts], device=model.device)
        self._start = after.repeat_interleave(len(prompts))
        self._next = self._start

    def feed(self, ids: Sequence[list[int]]) -> torch.Tensor:
        """Last hidden states (rows, longest, H) of ids put after what is there; shorter rows are padded at the end."""
        longest = max(len(row) for row in ids)
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self._model.device)
        lengths = torch.tensor([len(row) for row in ids], device=self._model.device)
        steps = torch.arange(longest, device=self._model.device)
        self._mask = torch.cat([self._mask, (steps < lengths[:, None]).long()], 1)
        numbers = (self._next[:, None] + steps).expand(self._model.axes, -1, -1)  # text: the same on every axis
        hidden = self._run(self._model.language.get_input_embeddings()(padded), numbers)
        self._next = self._next + lengths
        return hidden

    def rewind(self, rows: Sequence[int]) -> None:
        """Forget what was fed, and all rows but these."""
        chosen = torch.tensor(list(rows), device=self._model.device)
        self._cache.crop(self._picture - self._mask.shape[1])  # a negative count: as many are removed
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen, : self._picture]
        self._start = self._start[chosen]
        self._next = self._start

    def _run(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """embeds (rows, n, H); positions (axes, rows, n)."""
        out = self._model.language(
            inputs_embeds=embeds,
            position_ids=positions if self._model.axes > 1 else positions[0],
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


def _last(hidden: torch.Tensor, ids: Sequence[list[int]]) -> torch.Tensor:
    """The state (rows, H) of each row's last id, before its padding."""
    return hidden[torch.arange(len(ids), device=hidden.device), [len(row) - 1 for row in ids]]
