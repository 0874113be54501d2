"""The measured sections of docs/quality.md: a table between its markers and a plot in docs/images.

    python -m tools.quality scenes --write docs/quality.md
    python -m tools.quality variants --pictures 100 --write docs/quality.md
    python -m tools.quality real-scenes --real build/real-llava/checkpoint --write docs/quality.md

Each section is one `svdprune evaluate` of the shipped model, or of the one that `python -m tools.real_llava` makes; its
own command is written under its table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.progress import Progress

from svdprune.calib.evaluate.plot import plot
from svdprune.calib.evaluate.tables import markdown
from svdprune.calib.sources import open_source
from svdprune.exporter.evaluate.contenders import VARIANT_NAMES, parse_contenders
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.exporter.source import locate
from svdprune.runtime.positions import POLICIES
from tools.tables import write_between

MODEL, REAL = "mini-llava", "real-llava"


@dataclass(frozen=True)
class Section:
    """What a section measures; no selectors: all there are."""

    data: str
    pictures: int
    selectors: tuple[str, ...]
    keeps: tuple[int, ...] = (128, 64, 32, 16)
    labels: bool = True
    model: str = MODEL


RULES = ("leverage", "leverage-grid", "leverage-dpp", "maxmin", "dpp", "random", "grid")
REPAIRS = ("leverage", "leverage-grid", "leverage-dpp", "leverage:centre", "maxmin", "random", "grid")
SECTIONS = {
    "scenes": Section("scenes", 200, ()),
    "variants": Section("scenes", 100, ("leverage", *VARIANT_NAMES, "random", "grid"), (64, 32)),
    "easy-vqa": Section("easy-vqa", 40, RULES, (64, 32, 16), labels=False),
    "repairs": Section("scenes", 40, REPAIRS, (64, 32, 16)),
    "real-scenes": Section("scenes", 20, RULES, model=REAL),
    "real-easy-vqa": Section("easy-vqa", 20, RULES, model=REAL),
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(SECTIONS)), required=True)
@click.option("--pictures", type=click.IntRange(min=1), help="Instead of the section's own number.")
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    default=Path("build/real-llava/checkpoint"),
    show_default=True,
    help="Folder of the second model.",
)
@click.option("--write", type=click.Path(exists=True, path_type=Path), help="The page; its images/ gets the plots.")
def main(names: tuple[str, ...], pictures: int | None, threads: int, real: Path, write: Path | None) -> None:
    torch.set_num_threads(threads)
    models: dict[str, Model] = {}
    for name in names:
        section = SECTIONS[name]
        place = {MODEL: MODEL, REAL: str(real)}[section.model]
        if section.model not in models:
            models[section.model] = Model(locate(place).checkpoint, section.model, report=click.echo)
        count = pictures or section.pictures
        with Progress() as bar:
            task = bar.add_task(name, total=1.0)
            report = evaluate_model(
                models[section.model],
                section.model,
                open_source(section.data, limit=count, seed=0, labels=section.labels),
                parse_contenders(section.selectors),
                section.keeps,
                list(POLICIES),
                progress=lambda step, share, bar=bar, task=task: bar.update(task, completed=share),
            )
        shown = "build/real-llava/checkpoint" if section.model == REAL else MODEL
        command = f"svdprune evaluate {shown} --data {section.data} --pictures {count} --keep " + ",".join(
            map(str, section.keeps)
        )
        command += f" --selectors {','.join(section.selectors)}" if section.selectors else ""
        command += "" if section.labels else " --no-labels"
        text = f"{markdown(report)}\n\n    {command}"
        click.echo(text)
        if write is not None:
            image = write.parent / "images" / f"quality-{name}.png"
            image.parent.mkdir(exist_ok=True)
            beside = image.with_name(f".{image.name}.partial")
            beside.write_bytes(plot(report, f"{section.model}, {section.data}: {report.pictures} pictures"))
            os.replace(beside, image)
            picture = f"![{report.metric} against the tokens kept](images/{image.name})"
            write_between(write, f"quality-{name}", f"{picture}\n\n{text}")


if __name__ == "__main__":
    main()
