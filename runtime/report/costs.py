"""The sections on time and memory: measured stages, and the model of the target."""

from __future__ import annotations

from collections.abc import Sequence

from svdprune.runtime.cli.show import human_bytes
from svdprune.runtime.manifest import Manifest
from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.report import PREPROCESS, SELECTION, STAGES, Arm, ProfileReport
from svdprune.runtime.profile.text import LABELS, where_text
from svdprune.runtime.report.charts import Bar, Bars, bar_chart
from svdprune.runtime.report.facts import Elsewhere, Estimated, EstimatedCase
from svdprune.runtime.report.parts import NONE, Section, Table, count, milliseconds, short, times

SLOWEST = 10  # layers in the table
SMALL = (
    "Below 1, all / K means that the selection's own kernels take longer than the dropped tokens save: a small model's "
    "layers are over before the next kernel starts."
)
ENOUGH = 10  # timings from which a 90th percentile means something


def times_section(report: ProfileReport | None, note: str | None, brief: bool) -> Section:
    """Measured times of the stages.

    Args:
        report: None where nothing was measured, and ``note`` says why.
        brief: whether it is the short measurement of the export.
    """
    name, title = "times", "Stage times, measured"
    how = (
        "`svdprune profile BUNDLE --json > profile.json` on the machine that will answer, then "
        "`svdprune report BUNDLE --profile profile.json`, puts its figures here."
    )
    if report is None:
        return Section(name, title, [f"Nothing was measured{': ' + note if note else ''}.", how])
    arms = [arm for arm in (report.pruned, report.unpruned) if arm is not None]
    turns = "pruned and unpruned in turn" if len(arms) > 1 else "the pruned graph alone"
    lead = [
        f"{where_text(report.where)}.",
        f"{count(report.runs, 'run')} after {report.warm_up} of warm-up, {turns}, "
        f"{count(report.new_tokens, 'new token')} each; vision by `{report.vision}` ({report.vision_precision}), "
        f"decoder by `{report.decoder}` "
        f"({report.decoder_precision}). Medians.",
    ]
    if brief:
        lead.insert(1, f"A short measurement while the bundle was exported, not on the target. For real figures: {how}")
    tables = [_stage_table(report, arms)]
    for arm in arms:
        if arm.layers is not None:
            tables.append(_parts_table(arm, arm.layers))
    if report.pruned.layers is not None:
        tables.append(_layer_table(report.pruned.layers))
    notes = [f"{arm.name}: {text}" for arm in arms for text in arm.notes]
    return Section(name, title, lead, charts=[bar_chart(_stage_chart(report, arms))], tables=tables, notes=notes)


def _stage_chart(report: ProfileReport, arms: Sequence[Arm]) -> Bars:
    stages = [stage for stage in STAGES if stage in report.pruned.stages and stage != PREPROCESS]
    groups = []
    for stage in stages:
        found = [arm.stages.get(stage) for arm in arms]
        bars = [None if one is None else Bar(one.median, milliseconds(one.median)) for one in found]
        groups.append((LABELS[stage].strip(), bars))
    about = f"{report.pruned.tokens} of {report.tokens} vision tokens"
    names = [f"{arm.tokens} vision tokens" for arm in arms]
    return Bars("times-chart", "Time of each stage", f"Median times with {about}; the table has them.", names, groups)


def _stage_table(report: ProfileReport, arms: Sequence[Arm]) -> Table:
    stages = [stage for stage in STAGES if any(stage in arm.stages for arm in arms)]
    wide = all(summary.count >= ENOUGH for arm in arms for summary in arm.stages.values())
    columns, rows = ["stage"], []
    for arm in arms:
        columns += [f"{arm.tokens} tokens"] + (["90th percentile"] if wide else [])
    columns += ["all / K"] if len(arms) > 1 else []
    for stage in stages:
        row = [LABELS[stage].strip() + (" (part of vision)" if stage == SELECTION else "")]
        for arm in arms:
            one = arm.stages.get(stage)
            row += [NONE if one is None else milliseconds(one.median)]
            row += [NONE if one is None else milliseconds(one.p90)] if wide else []
        both = stage in report.ratios
        rows.append(row + ([f"{report.ratios[stage]:.2f}x" if both else NONE] if len(arms) > 1 else []))
    rows.append(["rows of the prompt", *_spaced([f"{arm.prompt:,}" for arm in arms], wide, len(arms) > 1)])
    return Table("Median time of each stage", columns, rows)


def _spaced(cells: Sequence[str], wide: bool, ratio: bool) -> list[str]:
    """Cells for the columns of the medians, the others left empty."""
    row = [part for cell in cells for part in ((cell, "") if wide else (cell,))]
    return row + ([""] if ratio else [])


def _parts_table(arm: Arm, table: LayerTable) -> Table:
    whole = sum(summary.median for summary in table.parts.values()) or 1.0
    rows = [(part, milliseconds(s.median), f"{100 * s.median / whole:.1f} %") for part, s in table.parts.items()]
    return Table(f"The {arm.name} vision graph by part ({table.source})", ("part", "median", "share"), rows)


def _layer_table(table: LayerTable) -> Table:
    rows = [
        (layer.name, layer.operator, layer.part, milliseconds(layer.seconds), f"{100 * layer.share:.1f} %")
        for layer in table.layers[:SLOWEST]
    ]
    columns = ("layer", "operator", "part", "median", "share")
    title = f"The slowest of the pruned graph's {len(table.layers)} layers ({table.source})"
    return Table(title, columns, rows, words=(1, 2))


def estimate_section(found: Estimated | None, note: str | None, elsewhere: Sequence[Elsewhere]) -> Section:
    """What the target should take, by the roofline model."""
    name, title = "estimate", "Estimate for the target"
    if found is None:
        said = f"There is no estimate{': ' + note if note else ''}."
        return Section(name, title, [said, "`svdprune estimate MODEL --keep K --target NAME` makes one from a config."])
    timed = found.pruned.first_token is not None
    lead = [
        f"This is {found.kind}: work counted from the model's config, for {found.device} (`{found.target}`), vision in "
        f"{found.precision} and decoder in {found.decoder_precision}, {count(found.prompt_tokens, 'text token')} and "
        f"{count(found.new_tokens, 'new token')}, at K = {found.pruned.tokens} and at all {found.unpruned.tokens} "
        "vision tokens."
    ]
    if not timed:
        lead.append("The target has no fixed peaks, so there are no times, only the work.")
    charts = [bar_chart(_estimate_chart(found))] if timed else []
    tables = [_work_table(found, timed), *([_elsewhere_table(elsewhere)] if elsewhere else [])]
    notes = [_note(text) for text in found.notes]
    if any(line.pruned > line.unpruned for line in elsewhere):
        notes.append(SMALL)
    return Section(name, title, lead, charts=charts, tables=tables, notes=notes)


def _estimate_chart(found: Estimated) -> Bars:
    cases = (found.pruned, found.unpruned)
    groups = []
    for number, stage in enumerate(found.pruned.stages):
        values = [case.stages[number].seconds or 0.0 for case in cases]
        groups.append((stage.name, [Bar(value, milliseconds(value)) for value in values]))
    values = [case.first_token or 0.0 for case in cases]
    groups.append(("first token", [Bar(value, milliseconds(value)) for value in values]))
    names = [f"{case.tokens} vision tokens" for case in cases]
    about = f"Modelled times on {found.target}; the table has them."
    return Bars("estimate-chart", f"Modelled time of each stage on {found.target}", about, names, groups)


def _work_table(found: Estimated, timed: bool) -> Table:
    a, b = found.pruned, found.unpruned
    per_case = ["GFLOP", "MB", *(["time", "bound by"] if timed else [])]
    columns = ["stage", *(f"{head}, {case}" for case in (f"K = {a.tokens}", f"all {b.tokens}") for head in per_case)]
    columns += ["all / K"] if timed else []
    rows = []
    for one, other in zip(a.stages, b.stages, strict=True):
        row = [one.name]
        for stage in (one, other):
            row += [short(stage.flops / 1e9), short(stage.bytes / 1e6)]
            row += [milliseconds(stage.seconds or 0.0), stage.bound or NONE] if timed else []
        rows.append(row + ([times(other.seconds or 0.0, one.seconds or 0.0)] if timed else []))
    for name in ("first_token", "answer") if timed else ():
        pair = [getattr(case, name) or 0.0 for case in (a, b)]
        cells = [cell for value in pair for cell in ("", "", milliseconds(value), "")]
        rows.append([name.replace("_", " "), *cells, times(pair[1], pair[0])])
    return Table("Work of each stage, modelled", columns, rows, words=(4, 8) if timed else ())


def _elsewhere_table(lines: Sequence[Elsewhere]) -> Table:
    rows = [
        (
            f"{line.target} ({line.device})",
            line.precision,
            milliseconds(line.pruned),
            milliseconds(line.unpruned),
            times(line.unpruned, line.pruned),
            human_bytes(line.memory),
            _fits(line.fits),
        )
        for line in lines
    ]
    columns = ("target", "precision", "first token, K", "all tokens", "all / K", "memory, K", "fits")
    return Table("The same model on every target with known peaks", columns, rows, words=(1, 6))


def memory_section(manifest: Manifest, found: Estimated | None, size: int) -> Section:
    """What the bundle and its model take."""
    sizes = [f"The bundle takes {human_bytes(size)} on disk."]
    if found is None:
        return Section("memory", "Memory", sizes)
    a, b = found.pruned, found.unpruned
    rows = [
        (part, human_bytes(a.memory[part]), human_bytes(b.memory[part]), times(b.memory[part], a.memory[part]))
        for part in a.memory
        if part in b.memory
    ]
    rows.append(("total", human_bytes(a.total), human_bytes(b.total), times(b.total, a.total)))
    rows += [("fits", _fits(a.fits), _fits(b.fits), "")] if found.free is not None else []
    columns = ("part", f"K = {a.tokens}", f"all {b.tokens}", "all / K")
    lead = [*sizes, f"In memory while it answers, by the same model as above for `{found.target}`, not measured:"]
    if found.free is not None:
        lead[-1] = lead[-1][:-1] + f"; {human_bytes(found.free)} are free there:"
    return Section("memory", "Memory", lead, tables=[Table("Memory, modelled", columns, rows)], notes=_cache(manifest))


def _cache(manifest: Manifest) -> list[str]:
    engine = manifest.decoder.engine
    if engine is None:
        return []
    return [f"A decoder engine allocates its whole KV cache, {engine.cache:,} rows: the table has the rows in use."]


def _fits(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "NO"


def _note(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def headline_seconds(case: EstimatedCase) -> str:
    """The modelled first token, for the head of the page."""
    return NONE if case.first_token is None else milliseconds(case.first_token)
