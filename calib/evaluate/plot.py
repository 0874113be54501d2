"""Accuracy (or agreement) against the tokens kept, one panel for each position policy, as PNG."""

from __future__ import annotations

import io
from typing import Any

from svdprune.calib.evaluate.report import CHANCE, UNPRUNED, Report, Row
from svdprune.runtime.lazy import require

LEVERAGE, EVEN = "leverage", "grid"
_STYLE = {LEVERAGE: ("#c4321f", "o", 2.4), CHANCE: ("#4a4a4a", "s", 1.8), EVEN: ("#8a8a8a", "D", 1.8)}
_OTHERS = (
    *("#1f6fb4", "#2a8a4a", "#8a4fb0", "#c98a00", "#0f9a9a", "#a0522d"),
    *("#5a6fd0", "#b03a76", "#6b8e23", "#17becf", "#e377c2", "#2f4f4f"),
)


def plot(report: Report, title: str) -> bytes:
    """The picture. Leverage is drawn boldest, its variants thin; `random` has a band from its worst to its best seed.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib", "data", "the plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(row.positions for row in report.rows if row.selector != UNPRUNED)) or ["compact"]
    figure: Any = Figure(figsize=(4.6 * len(policies) + 2.2, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    colors = iter(_OTHERS * 4)
    styles: dict[str, tuple[str, str, float, str]] = {}
    for panel, policy in zip(panels, policies, strict=True):
        _panel(panel, report, policy, styles, colors)
    panels[0].set_ylabel(f"{report.metric} of the answers")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(panel: Any, report: Report, policy: str, styles: dict[str, Any], colors: Any) -> None:
    whole = next((row for row in report.rows if row.selector == UNPRUNED), None)
    if whole is not None and report.labelled and whole.headline is not None:
        panel.axhline(whole.headline.value, color="#202020", linewidth=1.0, label=f"all {report.tokens} tokens")
        panel.axhspan(whole.headline.low, whole.headline.high, color="#202020", alpha=0.08, linewidth=0)
    lines: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.positions == policy and row.selector != UNPRUNED and row.headline is not None:
            lines.setdefault(row.selector, []).append(row)
    for name, rows in lines.items():
        rows.sort(key=lambda row: row.keep)
        if name not in styles:
            thin = name.startswith(f"{LEVERAGE}:")
            color, marker, width = _STYLE.get(name) or (next(colors), "." if thin else "^", 1.1 if thin else 1.6)
            styles[name] = (color, marker, width, "--" if thin or name == EVEN else "-")
        color, marker, width, dash = styles[name]
        keeps = [row.keep for row in rows]
        values = [row.headline.value for row in rows if row.headline]
        panel.plot(keeps, values, dash, color=color, marker=marker, markersize=4.5, linewidth=width, label=name)
        spread = [row.spread for row in rows]
        if all(spread):
            panel.fill_between(
                keeps, [s[0] for s in spread if s], [s[1] for s in spread if s], color=color, alpha=0.15, linewidth=0
            )
    ticks = sorted({row.keep for rows in lines.values() for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(f"vision tokens kept, of {report.tokens}")
    panel.set_title(f"{policy} positions", fontsize=10)
    panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
