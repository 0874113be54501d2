"""A profile as plain text, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.report import (
    DECODE,
    FIRST_TOKEN,
    PREFILL,
    PREPROCESS,
    SELECTION,
    STAGES,
    TOTAL,
    VISION,
    Arm,
    ProfileReport,
    Where,
)
from svdprune.runtime.profile.stats import Summary

WIDTH = 80
LABELS = {
    PREPROCESS: "preprocess",
    VISION: "vision",
    SELECTION: "  selection",
    PREFILL: "prefill",
    DECODE: "decode, a token",
    FIRST_TOKEN: "first token",
    TOTAL: "total",
}
_LABEL, _NUMBER = 18, 9


def profile_text(report: ProfileReport, layers: int) -> str:
    """The whole report.

    Args:
        layers: how many of the slowest layers and operators to list; 0 for none.
    """
    lines = [*_head(report), "", *_stages(report)]
    for arm in filter(None, (report.pruned, report.unpruned)):
        lines += [line for note in arm.notes for line in textwrap.wrap(f"{arm.name}: {note}", WIDTH)]
    if layers:
        lines.append("")
        for arm in filter(None, (report.pruned, report.unpruned)):
            if arm.layers is not None:
                lines += _parts(arm, arm.layers)
        if report.pruned.layers is not None:
            lines += ["", *_layers(report.pruned.layers, layers)]
    return "\n".join(lines)


def where_text(where: Where) -> str:
    """One sentence on the machine, beginning with whether these are a CPU's or a GPU's figures."""
    threads = "the backend's choice of threads" if where.threads is None else f"{where.threads} threads"
    threads = "1 thread" if where.threads == 1 else threads
    cores = "1 core" if where.cores == 1 else f"{where.cores} cores"
    load = "" if where.load is None else f", load average {where.load:.1f} before the run"
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    return f"{where.kind} figures: {where.processor}, {cores}, {threads}{load}; {versions}"


def _head(report: ProfileReport) -> Iterator[str]:
    backends = (
        f"{report.model}: {report.pruned.tokens} of {report.tokens} vision tokens; vision by {report.vision} "
        f"({report.vision_precision}), decoder by {report.decoder} ({report.decoder_precision})"
    )
    turns = "pruned and unpruned in turn" if report.unpruned else "the unpruned graph left out"
    counts = f"{report.runs} runs after {report.warm_up} of warm-up, {turns}, {report.new_tokens} new tokens each"
    for text in (backends, where_text(report.where), f"{counts}; milliseconds"):
        yield from textwrap.wrap(text, WIDTH)


def _stages(report: ProfileReport) -> Iterator[str]:
    arms = [arm for arm in (report.pruned, report.unpruned) if arm is not None]
    group = 3 * _NUMBER
    titles = [f"{arm.tokens} tokens, prompt {arm.prompt}" for arm in arms]
    yield (" " * _LABEL + "".join(f"{title:>{group}}" for title in titles)).rstrip()
    columns = "".join(f"{name:>{_NUMBER}}" for name in ("median", "p90", "p99"))
    yield f"{'stage':<{_LABEL}}" + columns * len(arms) + ("   ratio" if len(arms) > 1 else "")
    for stage in STAGES:
        if not any(stage in arm.stages for arm in arms):
            continue
        ratio = f"{report.ratios[stage]:>8.2f}" if stage in report.ratios else ""
        yield (f"{LABELS[stage]:<{_LABEL}}" + "".join(_cells(arm.stages.get(stage)) for arm in arms) + ratio).rstrip()


def _cells(summary: Summary | None) -> str:
    if summary is None:
        return f"{'-':>{_NUMBER}}" + " " * 2 * _NUMBER
    return "".join(f"{_ms(value):>{_NUMBER}}" for value in (summary.median, summary.p90, summary.p99))


def _ms(seconds: float) -> str:
    """Milliseconds, with as many decimals as nine columns are sensibly filled with."""
    value = 1e3 * seconds
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _parts(arm: Arm, table: LayerTable) -> Iterator[str]:
    """One arm's vision graph by part."""
    whole = sum(summary.median for summary in table.parts.values()) or 1.0
    shares = (f"{part} {_ms(s.median)} ({s.median / whole:.1%})" for part, s in table.parts.items())
    yield from textwrap.wrap(f"{arm.name} vision graph, layers by part, median ms: {', '.join(shares)}", WIDTH)


def _layers(table: LayerTable, count: int) -> Iterator[str]:
    whole = sum(layer.seconds for layer in table.layers) or 1.0
    yield f"pruned vision graph by {table.source}, {table.runs} runs: slowest operators"
    for operator, seconds in list(table.operators.items())[:count]:
        number = sum(layer.operator == operator for layer in table.layers)
        yield f"{_ms(seconds):>10} {seconds / whole:>6.1%}  {_cut(operator, 40)} ({number})"
    yield "slowest layers"
    for layer in table.layers[:count]:
        kinds = f"{_cut(layer.part, 10):<10} {_cut(layer.operator, 14):<14}"
        start = f"{_ms(layer.seconds):>10} {layer.share:>6.1%}  {kinds} "
        yield start + _cut(layer.name, WIDTH - len(start))


def _cut(text: str, width: int) -> str:
    """``text`` with its middle left out where it is longer."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
