"""What the commands share in speaking to a person: sizes, tables, JSON, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # `svdprune run` draws nothing and must not wait for rich to be imported
    from rich.console import Console
    from rich.progress import Progress

    from svdprune.runtime.manifest import QuantisationInfo


def human_bytes(count: int) -> str:
    """1536 -> "1.5 kB"; powers of 1000, as disks and downloads are counted."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def quantisation_facts(info: QuantisationInfo) -> list[tuple[str, str]]:
    """What quantising the vision graph changed, for a person: (name, fact) lines."""
    left = f"{len(info.float_blocks)} of {info.blocks} blocks in {info.float_type}"
    if info.float_blocks:
        left += f": {', '.join(info.float_blocks)}"
    if info.target_met is False:
        left += "; the wanted overlap was not reached: consider fp16, or other calibration pictures"
    return [
        ("quantised", f"scales from {info.calibrated_on} pictures of {info.source} (rule {info.ranges}), {left}"),
        (
            "it changed",
            f"on {info.pictures} other pictures: {info.overlap:.1%} of the kept set the same (worst "
            f"{info.worst_overlap:.1%}), cosine of the tokens {info.cosine:.5f}, {info.agreement:.1%} of first tokens "
            f"the same, size {info.size_ratio:.2f} of {info.float_type}",
        ),
    ]


def print_json(value: Any) -> None:
    """One JSON document on stdout, strict (no NaN)."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", *, tight: bool = False
) -> None:
    """A table on stdout; on a terminal it fits the window, elsewhere it takes the width it needs.

    A ``tight`` one has no edge: four columns narrower, and nothing above and below it.
    """
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title or None, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = not tight
    for row in rows:
        table.add_row(*row)
    stdout_console().print(table)


def stdout_console() -> Console:
    """A console on stdout as it is now, without markup: values may hold square brackets."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, markup=False, highlight=False, width=None if terminal else 200)


class Steps:
    """Progress of a long command on stderr: a live line on a terminal, one plain line a step elsewhere.

    Call it with the step's name and the share of the whole that is done (0 to 1), or None when that is not known.
    """

    def __init__(self) -> None:
        self._live: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._live = Progress(
                SpinnerColumn(finished_text="✓"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._task = self._live.add_task("", total=1.0)
        self._step = ""

    def __enter__(self) -> Steps:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, step: str, share: float | None) -> None:
        """Report: ``step`` is under way, ``share`` of the whole is done."""
        if self._live:
            self._live.update(self._task, description=step)
            if share is not None:
                self._live.update(self._task, completed=share)
        elif step != self._step:
            click.echo(step, err=True)
        self._step = step

    def say(self, line: str) -> None:
        """A line that stays, on stderr."""
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(line, err=True)
