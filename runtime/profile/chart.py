"""A profile as a bar chart."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.profile.report import (
    DECODE,
    FIRST_TOKEN,
    PREFILL,
    PREPROCESS,
    SELECTION,
    VISION,
    Arm,
    ProfileReport,
)
from svdprune.runtime.profile.text import where_text

BARS = {
    PREPROCESS: "preprocess",
    VISION: "vision",
    PREFILL: "prefill",
    DECODE: "decode,\none token",
    FIRST_TOKEN: "first token",
}
COLOURS = {"pruned": "#1b7f79", "unpruned": "#b0b7bd"}
_HEIGHT = 0.38  # of a bar; two stand side by side in a row of 1


def check_chart_path(path: Path) -> None:
    """Refuse a place where no PNG can be written, and a machine that cannot draw, before the work.

    Raises:
        UserError: another suffix, or no such folder. MissingDependency: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} does not end in .png: the chart is a PNG picture")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for the chart {path.name}: make it first")
    require("matplotlib", extra="profile", feature="--chart")


def save_chart(report: ProfileReport, path: Path) -> None:
    """Write the medians as bars, with whiskers to the 90th percentile, to a PNG.

    Raises:
        UserError: it cannot be written. MissingDependency: matplotlib is not installed.
    """
    check_chart_path(path)
    figure_module = require("matplotlib.figure", extra="profile", feature="--chart")
    agg = require("matplotlib.backends.backend_agg", extra="profile", feature="--chart")
    figure = figure_module.Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = [arm for arm in (report.pruned, report.unpruned) if arm is not None]
    for index, arm in enumerate(arms):
        _draw(axes, arm, report, (index - (len(arms) - 1) / 2) * _HEIGHT)
    axes.set_yticks(range(len(BARS)), list(BARS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds: median, whisker to the 90th percentile")
    axes.set_xlim(0, 1.22 * max(1e3 * arm.stages[stage].p90 for arm in arms for stage in BARS))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    axes.set_title(
        textwrap.fill(
            f"{report.model}: vision by {report.vision} ({report.vision_precision}), "
            f"decoder by {report.decoder} ({report.decoder_precision})",
            100,
        ),
        loc="left",
        fontsize=11,
    )
    runs = f"{report.runs} runs" + (" in turn" if report.unpruned else "")
    said = textwrap.fill(f"{where_text(report.where)}; {runs}", 130)
    figure.supxlabel(said, fontsize=8, color="#555555", x=0.01, ha="left")
    beside = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another place") from error
    finally:
        beside.unlink(missing_ok=True)


def _draw(axes: Any, arm: Arm, report: ProfileReport, offset: float) -> None:
    """One arm's bars, each with its figure and, on the unpruned ones, how many times the pruned one it is."""
    places = [row + offset for row in range(len(BARS))]
    summaries = [arm.stages[stage] for stage in BARS]
    medians = [1e3 * summary.median for summary in summaries]
    whiskers = [1e3 * (summary.p90 - summary.median) for summary in summaries]
    axes.barh(
        places,
        medians,
        _HEIGHT * 0.92,
        color=COLOURS[arm.name],
        label=f"{arm.name}: {arm.tokens} vision tokens",
        xerr=[[0.0] * len(medians), whiskers],
        error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2},
    )
    if SELECTION in arm.stages:
        row, width = list(BARS).index(VISION), 1e3 * arm.stages[SELECTION].median
        left = max(0.0, medians[row] - width)  # the last but the projector, which is thin
        axes.barh(places[row], width, _HEIGHT * 0.92, left=left, color="#f2a541", label="of which selection")
    for place, stage, median, whisker in zip(places, BARS, medians, whiskers, strict=True):
        ratio = f"  ({report.ratios[stage]:.2f} x)" if arm.name == "unpruned" and stage in report.ratios else ""
        text = f"{median:.1f}" if median >= 10 else f"{median:.2f}"
        axes.annotate(
            text + ratio, (median + whisker, place), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
