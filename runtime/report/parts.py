"""What a section of the page is made of, as plain values; and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from svdprune.runtime.report.pictures import Shown

NONE = "-"  # an empty cell


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row. ``words`` are the numbers of other columns that hold text."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page. In all its text, what stands between backticks is shown as code.

    Attributes:
        name: its anchor.
        title: its heading.
        lead: paragraphs before everything else.
        pictures, charts, tables: in this order.
        notes: small paragraphs at the end.
    """

    name: str
    title: str
    lead: Sequence[str] = ()
    pictures: Sequence[Shown] = ()
    charts: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def percent(share: float, digits: int = 1) -> str:
    """0.0556 -> "5.6 %"."""
    return f"{100 * share:.{digits}f} %"


def head(share: float) -> str:
    """A percentage as a column's heading, which a narrow table does not break."""
    return percent(share, 0).replace(" ", "\u00a0")


def milliseconds(seconds: float) -> str:
    """With as many digits as mean something: "0.123 ms", "12.3 ms", "1234 ms"."""
    return f"{short(1e3 * seconds)} ms"


def short(value: float) -> str:
    """About three digits, without an exponent where that can be."""
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def times(more: float, less: float) -> str:
    """How many times as much: "3.20x"."""
    return f"{more / less:.2f}x" if more > 0 and less > 0 else NONE


def count(number: int, noun: str) -> str:
    """ "1 picture", "3 pictures"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
