"""Accuracy of `mini-llava` (or another checkpoint of its kind) on fresh drawn scenes, by question kind,
selector, count of kept tokens and position policy.

    python -m tools.accuracy --checkpoint exporter/models/mini-llava --pictures 1000            # unpruned
    python -m tools.accuracy --checkpoint exporter/models/mini-llava --pictures 300 --keep 128,64,32,16

An answer counts when all of it is the expected text. The measuring is `svdprune evaluate`'s; this writes its accuracies
as the tables of docs/accuracy.md and of the model card.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from rich.progress import Progress

from svdprune.calib.evaluate.report import Report
from svdprune.calib.scenes import KINDS
from svdprune.calib.sources import open_source
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.contenders import parse_contenders
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.runtime.positions import POLICIES, policy_named
from tools.tables import write_between


def table(report: Report) -> str:
    """Markdown: a row a setting, a column a kind; the last columns are all questions and their 95 % interval."""
    lines = [f"| selector | K | positions | {' | '.join(KINDS)} | all | 95 % |", "|---" * (len(KINDS) + 5) + "|"]
    for row in report.rows:
        shares = [f"{row.kinds[kind].value:.3f}" if kind in row.kinds else "-" for kind in KINDS]
        every = row.accuracy
        assert every is not None  # scenes are labelled
        lines.append(
            f"| {row.selector} | {row.keep} | {row.positions} | {' | '.join(shares)} | **{every.value:.3f}** | "
            f"{every.low:.3f}-{every.high:.3f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--pictures", default=1000, show_default=True)
@click.option("--seed", default="held-out", show_default=True, help="Training draws from other seeds.")
@click.option("--keep", default="", help="Counts of kept tokens, as in 128,64,32,16; empty: the unpruned model alone.")
@click.option("--selectors", default="", help="As in leverage,grid; empty: all.")
@click.option("--positions", default=",".join(POLICIES), show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose table is replaced.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), default=None)
def main(
    checkpoint: Path,
    pictures: int,
    seed: str,
    keep: str,
    selectors: str,
    positions: str,
    threads: int,
    write: Path | None,
    as_json: Path | None,
) -> None:
    torch.set_num_threads(threads)
    keeps = [int(k) for k in keep.split(",") if k]
    source = open_source(f"scenes:{seed}", limit=pictures, seed=0)
    contenders = parse_contenders(selectors.split(",")) if keeps else []
    policies = [policy_named(name) for name in positions.split(",")]
    model = Model(Checkpoint(checkpoint), str(checkpoint), report=click.echo)
    with Progress() as bar:
        task = bar.add_task("pictures", total=1.0)
        report = evaluate_model(
            model,
            checkpoint.name,
            source,
            contenders,
            keeps,
            policies,
            progress=lambda step, share: bar.update(task, completed=share),
        )
    text = f"{report.pictures} pictures, {report.rows[0].questions} questions, seed `{seed}`.\n\n{table(report)}"
    click.echo(text)
    if write is not None:
        write_between(write, "accuracy-pruned" if keeps else "accuracy", text)
    if as_json is not None:
        as_json.write_text(json.dumps(report.to_json(), allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
