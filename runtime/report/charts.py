"""Two kinds of chart as inline SVG: lines over an axis, and grouped bars. Colours come from the page's style sheet.

All text is escaped here; what is returned is markup. Series are told apart by colour, dash and marker, and named in a
legend, so that none of them is needed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 300  # units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
LEGEND = 22  # height of a line of the legend
BAR, GAP, GROUP = 17, 3, 16
_CHARACTER = 7.4  # width of a character of the small text, about


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y), ascending in x. ``spread``: (low, high) of each point, drawn as a bar."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float]] = ()
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, with ``ticks`` and their labels; ``log`` for a logarithmic one."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at ``low`` and 1 at ``high``; what lies outside is put on the edge."""
        low, high, here = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        share = (here - low) / (high - low) if high > low else 0.5
        return min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Lines:
    """A line chart. ``name`` is unique on the page; ``about`` says in words what is to be seen.

    ``across`` are levels of y and ``upright`` are places of x that get a thin line with a label.
    """

    name: str
    title: str
    about: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    across: Sequence[tuple[float, str]] = ()
    upright: Sequence[tuple[float, str]] = field(default_factory=tuple)


def line_chart(chart: Lines) -> Markup:
    """The chart as an ``<svg>``."""
    rows = _legend_rows([series.name for series in chart.series])
    height = HEIGHT + LEGEND * len(rows)
    top = TOP + LEGEND * len(rows)

    def at_x(value: float) -> float:
        return LEFT + chart.x.place(value) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return height - BOTTOM - chart.y.place(value) * (height - BOTTOM - top)

    parts = [*_legend(rows, _line_swatch)]
    for value, label in chart.y.ticks:
        y = at_y(value)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(_text(LEFT - 7, y + 4.5, label, "end"))
    for value, label in chart.x.ticks:
        parts.append(_text(at_x(value), height - BOTTOM + 18, label, "middle"))
        tick = '<path class="axis" d="M{:.1f} {}v5"/>'
        parts.append(Markup(tick).format(at_x(value), height - BOTTOM))
    parts.append(Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(LEFT, top, height - BOTTOM, WIDTH - RIGHT))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, chart.x.title, "middle", "title"))
    for value, label in chart.across:
        parts.append(Markup('<path class="mark" d="M{} {:.1f}H{}"/>').format(LEFT, at_y(value), WIDTH - RIGHT))
        parts.append(_text(LEFT + 5, at_y(value) - 5, label, "start", "note"))
    for value, label in chart.upright:
        x = at_x(value)
        parts.append(Markup('<path class="mark" d="M{:.1f} {}V{}"/>').format(x, top, height - BOTTOM))
        left = x > WIDTH * 0.66
        parts.append(_text(x - 6 if left else x + 6, height - BOTTOM - 9, label, "end" if left else "start", "note"))
    for number, series in enumerate(chart.series):
        parts += _line(number, series, at_x, at_y)
    return _svg(chart.name, chart.title, chart.about, height, parts)


@dataclass(frozen=True)
class Bar:
    """A length of 0 or more, and the text at its end."""

    value: float
    text: str


@dataclass(frozen=True)
class Bars:
    """Grouped horizontal bars: (label, one bar a series, None where there is none)."""

    name: str
    title: str
    about: str
    series: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Bar | None]]]


def bar_chart(chart: Bars) -> Markup:
    """The chart as an ``<svg>``."""
    rows = _legend_rows(chart.series)
    longest = max((bar.value for _, bars in chart.groups for bar in bars if bar), default=0.0) or 1.0
    label = 12 + _CHARACTER * max((len(name) for name, _ in chart.groups), default=0)
    ends = _CHARACTER * max((len(bar.text) for _, bars in chart.groups for bar in bars if bar), default=0) + 8
    room = max(60.0, WIDTH - RIGHT - label - ends)
    parts, y = [*_legend(rows, _bar_swatch)], float(TOP + LEGEND * len(rows))
    for name, bars in chart.groups:
        middle = y + (len(bars) * (BAR + GAP) - GAP) / 2
        parts.append(_text(label - 8, middle + 4.5, name, "end"))
        for number, bar in enumerate(bars):
            if bar is not None:
                width = max(1.0, bar.value / longest * room)
                shape = '<rect class="bar b{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"/>'
                parts.append(Markup(shape).format(number % 4, label, y, width, BAR))
                parts.append(_text(label + width + 6, y + BAR - 4, bar.text, "start"))
            y += BAR + GAP
        y += GROUP
    return _svg(chart.name, chart.title, chart.about, round(y), parts)


def share_axis(title: str, low: float = 0.0) -> Axis:
    """From ``low`` (0 to 1) up to 1, in per cent."""
    step = 0.25 if low <= 0.0 else 0.1 if low <= 0.6 else 0.05
    low = math.floor(low / step + 1e-9) * step
    count = round((1.0 - low) / step)
    ticks = [(low + n * step, f"{100 * (low + n * step):.0f} %") for n in range(count + 1)]
    return Axis(title, low, 1.0, ticks)


def count_axis(title: str, most: int, wanted: Sequence[int] = ()) -> Axis:
    """A logarithmic one from 1 to ``most``; ticks at powers of two, or at ``wanted``."""
    values = list(wanted) or [2**power for power in range(most.bit_length())]
    while len(values) > 9:
        values = values[::2]
    low = min(values, default=1)
    return Axis(title, low, max(most, low + 1), [(value, str(value)) for value in values], log=True)


def _line(
    number: int, series: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> Iterator[Markup]:
    places = [(at_x(x), at_y(y)) for x, y in series.points]
    for (x, _), (low, high) in zip(places, series.spread, strict=False):
        shape = '<path class="line l{} spread" d="M{:.1f} {:.1f}V{:.1f}M{:.1f} {:.1f}h8M{:.1f} {:.1f}h8"/>'
        ends = (at_y(low), at_y(high))
        yield Markup(shape).format(number % 4, x, *ends, x - 4, ends[0], x - 4, ends[1])
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield Markup('<path class="line l{}" d="M{}"/>').format(number % 4, path)
    if series.markers:
        for x, y in places:
            yield Markup('<circle class="dot d{}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(number % 4, x, y)


def _legend_rows(names: Sequence[str]) -> list[list[tuple[float, int, str]]]:
    """(x, number, name) of each, in rows that fit; nothing for a single series."""
    rows: list[list[tuple[float, int, str]]] = []
    x = float(WIDTH)
    for number, name in enumerate(names if len(names) > 1 else ()):
        width = 34 + _CHARACTER * len(name) + 18
        if not rows or x + width > WIDTH - RIGHT:
            rows.append([])
            x = 8.0
        rows[-1].append((x, number, name))
        x += width
    return rows


def _legend(
    rows: Sequence[Sequence[tuple[float, int, str]]], swatch: Callable[[float, float, int], Markup]
) -> Iterator[Markup]:
    for row, entries in enumerate(rows):
        y = TOP + LEGEND * row
        for x, number, name in entries:
            yield swatch(x, y, number)
            yield _text(x + 34, y + 4.5, name, "start")


def _line_swatch(x: float, y: float, number: int) -> Markup:
    return Markup('<path class="line l{}" d="M{:.1f} {:.1f}h26"/>').format(number % 4, x, y)


def _bar_swatch(x: float, y: float, number: int) -> Markup:
    shape = '<rect class="bar b{}" x="{:.1f}" y="{:.1f}" width="26" height="12" rx="2"/>'
    return Markup(shape).format(number % 4, x, y - 6)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> Markup:
    shape = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>'
    return Markup(shape).format(x, y, anchor, Markup(' class="{}"').format(kind) if kind else "", words)


def _svg(name: str, title: str, about: str, height: int, parts: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{n}-t {n}-d">'
        '<title id="{n}-t">{title}</title><desc id="{n}-d">{about}</desc>'
    ).format(w=WIDTH, h=height, n=escape(name), title=title, about=about)
    return head + Markup("").join(parts) + Markup("</svg>")
