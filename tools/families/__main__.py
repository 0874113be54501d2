"""Do the bundles of all families answer as transformers does, of this release and of an older one?

    python -m tools.families --write docs/families.md
    python -m tools.families --python OTHER_ENVIRONMENT/bin/python --python bin/python --write docs/families.md

A tiny checkpoint with random weights is made for every family (LLaVA's is the shipped model), exported with all tokens
kept and with K kept, and asked by the runtime. transformers answers the same prompts, `tools/families/reference.py`, in
this environment or in those of `--python`; for a release before 5 the folder is written in its layout first. Answers
are compared token by token, the picture's rows and the first token's logits by their largest difference. Where two
logits of the reference are within 1e-4, another choice is a tie. A difference makes the command fail, but for those
that KNOWN explains.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from tools.families.cases import MODELS, Case, Model, ask_all, checkpoint_of, exported, opened
from tools.families.older import older_layout
from tools.parity import compare
from tools.tables import write_between

_SHIFTED = "gives each patch but the first of its line the place before its own, by a rounding; transformers 5 its own"
# (family, releases that start so): why its answers differ there.
KNOWN = {
    ("smolvlm", "4."): _SHIFTED,
    ("idefics3", "4."): _SHIFTED,
    ("llava_onevision", "4."): "takes the tower's last hidden state after its last norm, transformers 5 before it",
}
COLUMNS = ((True, "compact"), (True, "original"), (False, "compact"), (False, "original"))


@dataclass
class Tally:
    """Answers of one column."""

    count: int = 0
    same: int = 0
    tie: int = 0

    def __str__(self) -> str:
        return f"{self.same} of {self.count}" + (f", {self.tie} ties" if self.tie else "")


@dataclass
class Row:
    """One family: the release compared with, the columns, the largest differences of a picture's rows and of first
    logits, and the reference's different answers."""

    release: str = ""
    columns: dict[tuple[bool, str], Tally] = field(default_factory=lambda: {key: Tally() for key in COLUMNS})
    rows: float = 0.0
    logits: float = 0.0
    answers: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether nothing differs but by ties."""
        return all(tally.same + tally.tie == tally.count for tally in self.columns.values())


def measured(name: str, model: Model, pythons: tuple[str, ...], work: Path) -> list[Row]:
    """Make, export and ask one family, and compare with the transformers of each interpreter."""
    checkpoint = checkpoint_of(model, work / "checkpoint")
    cases: list[Case] = []
    asked = []
    for keep in (None, model.keep):
        with opened(exported(checkpoint, work / f"bundle-{keep}", keep)) as vlm:
            found = ask_all(vlm, work, whole=keep is None)
            cases += found
            asked += [case.asked(vlm, model) for case in found]
    rows = []
    for number, python in enumerate(pythons):
        release = release_of(python)
        older = int(release.split(".")[0]) < 5
        folder = older_layout(checkpoint, work / f"older-{number}") if older else checkpoint
        (work / "cases.json").write_text(json.dumps({"checkpoint": str(folder), "cases": asked}))
        script = Path(__file__).with_name("reference.py")
        made = subprocess.run([python, str(script), str(work)], capture_output=True, text=True)
        if made.returncode:
            raise click.ClickException(f"{name}: transformers {release} failed: {made.stderr[-2000:]}")
        rows.append(compared(Row(release), cases, work))
    return rows


def release_of(python: str) -> str:
    """The release of transformers that an interpreter has."""
    line = "import importlib.metadata as m; print(m.version('transformers'))"
    return subprocess.run([python, "-c", line], capture_output=True, text=True, check=True).stdout.strip()


def compared(row: Row, cases: list[Case], work: Path) -> Row:
    """Fill a row with what the reference wrote."""
    reference = json.loads((work / "reference.json").read_text())["tokens"]
    with np.load(work / "reference.npz") as arrays:
        for number, (case, tokens) in enumerate(zip(cases, reference, strict=True)):
            tally = row.columns[case.whole, case.positions]
            outcome = compare(case.tokens, tokens, arrays[f"logits{number}"])
            tally.count += 1
            tally.same += outcome == "same"
            tally.tie += outcome == "tie"
            row.answers.add(tuple(tokens))
            row.logits = max(row.logits, float(np.abs(case.logits - arrays[f"logits{number}"][0]).max()))
            row.rows = max(row.rows, float(np.abs(case.rows - arrays[f"rows{number}"]).max()))
    return row


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    (release,) = {row.release for row in rows.values()}
    lines = [
        f"transformers {release}, greedy, float32: questions answered with the same tokens, how many different answers",
        "there were, and the largest differences of a picture's rows and of the first token's logits.",
        "",
        "| family | text model | all, compact | all, original | K, compact | K, original | answers | rows | logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        told = " | ".join(str(row.columns[key]) for key in COLUMNS)
        lines.append(
            f"| `{name}` | {MODELS[name].language} | {told} | {len(row.answers)} | {row.rows:.0e} | {row.logits:.0e} |"
        )
    notes = [f"`{name}` {why}." for name, row in rows.items() if (why := known(name, row)) and not row.whole]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def known(name: str, row: Row) -> str | None:
    """Why answers of this family differ from those of this release, where that is known."""
    return next(
        (why for (family, release), why in KNOWN.items() if family == name and row.release.startswith(release)), None
    )


@click.command(help=__doc__)
@click.option("--python", "pythons", multiple=True, help="Interpreters whose transformers are references.")
@click.option("--family", "names", multiple=True, type=click.Choice(list(MODELS)), help="Only these.")
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose tables are replaced.")
def main(pythons: tuple[str, ...], names: tuple[str, ...], write: Path | None) -> None:
    pythons = pythons or (sys.executable,)
    tables: list[dict[str, Row]] = [{} for _ in pythons]
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as work:
            for rows, row in zip(tables, measured(name, MODELS[name], pythons, Path(work)), strict=True):
                rows[name] = row
                told = ", ".join(str(tally) for tally in row.columns.values())
                click.echo(f"{name}, transformers {row.release}: {told}; rows {row.rows:.0e}, logits {row.logits:.0e}")
    wrong = []
    for rows in tables:
        text = table(rows)
        click.echo(text)
        release = next(iter(rows.values())).release
        if write is not None:
            write_between(write, f"families-{release.split('.')[0]}", text)
        wrong += [f"{n} ({release})" for n, row in rows.items() if not row.whole and known(n, row) is None]
    if wrong:
        raise click.ClickException(f"answers differ for {', '.join(wrong)}")


if __name__ == "__main__":
    main()
