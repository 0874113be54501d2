"""What `ask_many` gains: pictures encoded in batches, and ahead of the answers.

    python -m tools.bench_many --bundle build/mini-llava-k32 --write docs/performance.md

Questions about drawn scenes, answers of up to `--tokens` tokens. The ways run in turn, a process each, `--questions`
questions a call; the answers are compared, and a way whose answers are not those of asking one by one is an error. What
overlapping can gain is bounded by the smaller of the two shares, encoding and decoding, and by the processors that one
of them leaves idle.
"""

from __future__ import annotations

import hashlib
import platform
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from tools.tables import write_between
from tools.turns import Figures, Turn, in_turn, serve

if TYPE_CHECKING:
    from svdprune.runtime import Answer, Vlm

WAYS = ("ask, one by one", "overlap", "batch 4", "batch 4, overlap", "batch 8, overlap")


def _one_by_one(vlm: Vlm, requests: list[tuple[Any, str]], **settings: Any) -> list[Answer]:
    return [vlm.ask(picture, question, **settings) for picture, question in requests]


def _many(batch: int, overlap: bool, vlm: Vlm, requests: list[tuple[Any, str]], **settings: Any) -> list[Answer]:
    return list(vlm.ask_many(requests, batch, overlap, **settings))


def way(name: str) -> Callable[..., list[Answer]]:
    """How the way `name` asks."""
    if name == WAYS[0]:
        return _one_by_one
    batch = int(name.split()[1].strip(",")) if name.startswith("batch") else 1
    return partial(_many, batch, "overlap" in name)


def work(name: str, bundle: Path, questions: int, tokens: int, threads: int) -> None:
    """A process's part: all questions a call; a number that stands for the answers goes with the seconds."""
    from svdprune.calib.scenes import KINDS, ask, draw_scene
    from svdprune.runtime import load

    drawn, requests = random.Random(0), []
    while len(requests) < questions:
        scene = draw_scene(drawn)
        question = ask(drawn, scene, drawn.choice(KINDS))
        if question is not None:
            requests.append((np.asarray(scene.image), question.text))
    answer = way(name)
    with load(bundle, threads=threads, verify=False) as vlm:

        def call() -> Figures:
            answers = answer(vlm, requests, max_new_tokens=tokens)
            ids = repr([answer.token_ids for answer in answers]).encode()
            vision = sum(answer.times.preprocess + answer.times.vision for answer in answers)
            digest = int(hashlib.sha256(ids).hexdigest()[:8], 16)
            return {"answers": digest, "vision": vision, "generated": sum(a.tokens.generated for a in answers)}

        serve(call)


@click.command(help=__doc__)
@click.option("--bundle", required=True, type=click.Path(path_type=Path))
@click.option("--questions", default=24, show_default=True)
@click.option("--tokens", default=16, show_default=True, help="Most tokens of an answer.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose `many` table is replaced.")
@click.option("--worker", type=click.Choice(WAYS), hidden=True)
def main(
    bundle: Path, questions: int, tokens: int, threads: int, rounds: int, write: Path | None, worker: str | None
) -> None:
    if worker is not None:
        work(worker, bundle, questions, tokens, threads)
        return
    options = ["--bundle", str(bundle.resolve()), "--questions", str(questions), "--tokens", str(tokens)]
    options += ["--threads", str(threads)]
    turns = [
        Turn.start(name, ["tools.bench_many", "--worker", name, *options], threads, sys.executable) for name in WAYS
    ]
    failed = in_turn(turns, rounds)
    for name, reason in failed.items():
        raise click.ClickException(f"{name}: {reason}")
    alone = turns[0]
    reference = alone.median("seconds")
    lines = [
        f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}, {bundle.name}, {questions} "
        f"questions, {alone.median('generated') / questions:.1f} tokens an answer; medians of {rounds} calls in turn.",
        "",
        "| way | seconds | questions/s | gain | of it pictures |",
        "|---|---|---|---|---|",
    ]
    for turn in turns:
        if turn.calls[0]["answers"] != alone.calls[0]["answers"]:
            raise click.ClickException(f"{turn.name} gives other answers than asking one by one")
        seconds = turn.median("seconds")
        lines.append(
            f"| {turn.name} | {seconds:.2f} | {questions / seconds:.1f} | {reference / seconds:.2f} | "
            f"{turn.median('vision') / seconds:.0%} |"
        )
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, "many", text)


if __name__ == "__main__":
    main()
