"""A report as a table for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io

from svdprune.calib.evaluate.report import Figure, Report, Row


def table(report: Report, digits: int = 2) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, narrow enough for a terminal: kinds are left to the CSV. digits: of the intervals' ends."""
    rows = report.rows
    columns = ["selector", "K", "positions"]
    cells = [[row.selector, str(row.keep), row.positions] for row in rows]

    def add(name: str, values: list[str]) -> None:
        if any(values):
            columns.append(name)
            for line, value in zip(cells, values, strict=True):
                line.append(value)

    add("accuracy, 95 %", [_text(row.accuracy, digits) for row in rows])
    add("F1", ["" if row.f1 is None else f"{row.f1:.3f}" for row in rows])
    add("agreement, 95 %", [_text(row.agreement, digits) for row in rows])
    add("KL", ["" if row.kl is None else f"{row.kl.value:.3f}" for row in rows])
    add("- random", [_beside_random(row) for row in rows])
    add("select", ["" if row.select_seconds is None else f"{1e3 * row.select_seconds:.1f} ms" for row in rows])
    return columns, cells


def _text(figure: Figure | None, digits: int) -> str:
    return "" if figure is None else figure.text(digits)


def _beside_random(row: Row) -> str:
    """The difference, starred where its interval leaves out 0; for random itself, its lowest and highest seed."""
    if row.spread is not None:
        return f"({row.spread[0]:.3f}-{row.spread[1]:.3f})"
    figure = row.above_random
    if figure is None:
        return ""
    value = round(figure.value, 3) + 0.0  # no minus before a zero
    return f"{value:+.3f}{'*' if figure.low > 0 or figure.high < 0 else ''}"


def markdown(report: Report) -> str:
    """The table with a column for each kind of question, and a line of what it is."""
    kinds = list(dict.fromkeys(kind for row in report.rows for kind in row.kinds))
    columns, cells = table(report, digits=3)
    place = columns.index("positions") + 1
    columns[place:place] = kinds
    for line, row in zip(cells, report.rows, strict=True):
        line[place:place] = [f"{row.kinds[kind].value:.3f}" if kind in row.kinds else "" for kind in kinds]
        for name in ("accuracy", "agreement"):
            if f"{name}, 95 %" in columns and (value := line[columns.index(f"{name}, 95 %")]):
                head, _, rest = value.partition(" ")
                line[columns.index(f"{name}, 95 %")] = f"**{head}** {rest}"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    said = "; ".join(
        f"{name}: {value}" for name, value in report.facts.items() if name in ("model", "data", "questions")
    )
    return f"{said}.\n\n" + "\n".join(lines)


def to_csv(report: Report) -> str:
    """One line a setting, a column for each figure, its interval, and each kind of question."""
    kinds = list(dict.fromkeys(kind for row in report.rows for kind in row.kinds))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["accuracy", "agreement", "kl", "above_random", *(f"kind {kind}" for kind in kinds)]
    spans = [f"{name}{end}" for name in names for end in ("", " low", " high")]
    plain = ["selector", "keep", "positions", "questions", "f1", "matched", "lowest seed", "highest seed"]
    writer.writerow([*plain, "select seconds", *spans])
    for row in report.rows:
        figures = [row.accuracy, row.agreement, row.kl, row.above_random, *(row.kinds.get(kind) for kind in kinds)]
        low, high = row.spread or (None, None)
        single = [row.selector, row.keep, row.positions, row.questions, row.f1, row.matched, low, high]
        wide = [value for f in figures for value in ((f.value, f.low, f.high) if f else (None, None, None))]
        writer.writerow(["" if v is None else v for v in (*single, row.select_seconds, *wide)])
    return out.getvalue()
