"""The training loop all stages share: schedule, checkpoint, resume, progress."""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tools.mini_llava.muon import Muon
from tools.mini_llava.pretrain import Batch, Examples

Step = Callable[[Batch], tuple[torch.Tensor, dict[str, float]]]


def fit(
    stage: str,
    modules: dict[str, nn.Module],
    trained: Iterable[tuple[str, nn.Parameter]],
    examples: Examples,
    step: Step,
    *,
    steps: int,
    batch: int,
    rate: float,
    folder: Path,
    device: str,
    workers: int = 1,
    threads: int = 1,
    save_every: int = 100,
    decay_share: float = 0.0,
    halt: int | None = None,
) -> None:
    """Run `stage` to `steps` updates, going on from folder/<stage>.pt where it exists.

    The rate rises over the first 50 steps, holds, and falls linearly to nothing over the last `decay_share`
    of the steps. `halt` ends this call earlier, with the state saved.
    """
    path = folder / f"{stage}.pt"
    matrices, others = [], []
    for name, p in trained:
        hidden = p.ndim >= 2 and "embed" not in name and "lm_head" not in name and "heads" not in name
        (matrices if hidden else others).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, rate, threads=threads),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    done = 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["step"]
    if done >= steps:
        return
    examples.start = done * batch
    last = steps if halt is None else min(halt, steps)
    examples.stop = last * batch
    gradients = _Gradients(step, [*matrices, *others], threads)
    seen: dict[str, list[float]] = defaultdict(list)
    bar = tqdm(examples.batches(batch, workers), total=steps, initial=done, desc=stage, mininterval=5)
    began = time.time()
    for data in bar:
        factor = min(1.0, (done + 1) / 50, (steps - done) / max(1.0, decay_share * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        loss, shown = gradients({k: v.to(device) for k, v in data.items()})
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        done += 1
        for name, value in {"loss": loss, **shown}.items():
            seen[name].append(value)
        if done % 50 == 0 or done == steps:
            means = " ".join(f"{k} {sum(v[-50:]) / len(v[-50:]):.3f}" for k, v in seen.items())
            tqdm.write(f"{stage} {done}/{steps} {(time.time() - began) / 60:.1f} min {means}")
        if done % save_every == 0 or done == last:
            state = {
                "step": done,
                "modules": {k: m.state_dict() for k, m in modules.items()},
                "optimizers": [o.state_dict() for o in optimizers],
            }
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


class _Gradients:
    """Loss and gradients of a batch, its parts worked on by `threads` Python threads.

    One operator at a time on all cores waits for the slowest core thousands of times a step; parts of the
    batch wait once. On a shared machine that is two to five times faster.
    """

    def __init__(self, step: Step, params: list[nn.Parameter], threads: int):
        self.step, self.params, self.threads = step, params, threads
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Sets `.grad` of every parameter; returns the mean loss and what to print."""
        size = len(next(iter(batch.values())))
        cuts = 2 * self.threads if self.threads > 1 else 1  # more parts than threads: a slow core takes fewer
        bounds = [round(i * size / cuts) for i in range(cuts + 1)]
        parts = [{k: v[a:b] for k, v in batch.items()} for a, b in itertools.pairwise(bounds) if b > a]
        results = list(self.pool.map(self._part, parts))
        shares = [len(next(iter(p.values()))) / size for p in parts]
        for i, p in enumerate(self.params):
            grads = [g[i] * share for (_, _, g), share in zip(results, shares, strict=True) if g[i] is not None]
            p.grad = torch.stack(grads).sum(0) if grads else None
        loss = sum(value * share for (value, _, _), share in zip(results, shares, strict=True))
        shown = [s for _, s, _ in results]
        return loss, {k: sum(s[k] for s in shown) / len(shown) for k in shown[0]}

    def _part(self, batch: Batch) -> tuple[float, dict[str, float], tuple[torch.Tensor | None, ...]]:
        loss, shown = self.step(batch)
        return float(loss.detach()), shown, torch.autograd.grad(loss, self.params, allow_unused=True)
