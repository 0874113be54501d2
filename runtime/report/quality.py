"""The sections on what is kept and what it changes: pictures, energy, agreement, quantisation."""

from __future__ import annotations

from collections.abc import Sequence

from svdprune.runtime.cli.show import human_bytes, quantisation_facts
from svdprune.runtime.manifest import Manifest, VisionInfo
from svdprune.runtime.report.charts import Axis, Lines, Series, count_axis, line_chart, share_axis
from svdprune.runtime.report.facts import Energy
from svdprune.runtime.report.findings import Agreement, Calibrated
from svdprune.runtime.report.parts import NONE, Section, Table, count, head, milliseconds, percent, short, times
from svdprune.runtime.report.pictures import Shown

LEVELS = (0.8, 0.9, 0.95, 0.99)
ALL_OF_IT = 0.999  # where an energy curve is cut off


def kept_section(manifest: Manifest, pictures: Sequence[Shown], note: str | None) -> Section:
    """What was kept on each picture."""
    vision = manifest.vision
    if vision.keep == vision.tokens:
        lead = f"All {vision.tokens} vision tokens are kept: nothing is selected."
    else:
        of = f"{vision.tokens} vision tokens ({vision.grid[0]} x {vision.grid[1]} patches)"
        if vision.tiles is not None:
            each = vision.tiles.budget
            made = "prompt" if each == "prompt" else "picture"
            of = f"up to {vision.tokens} vision tokens of a {each} (at most {vision.tiles.most} tiles make a {made})"
        lead = (
            f"Of {of}, the {vision.keep} with the highest scores of `{vision.selector.name}` reach the language model. "
            "In the first panel, kept patches are bright and outlined, dropped ones dimmed; the second has every score."
        )
    return Section("kept", "What was kept", [lead], pictures, notes=[note] if note else [])


def energy_section(vision: VisionInfo, measured: Sequence[Energy], found: Calibrated | None) -> Section:
    """How few directions hold how much of the features."""
    curves = found.energy if found else measured
    name, title = "energy", "Energy curve"
    if not curves:
        text = "The bundle has none: it is measured at export, unless that was told `--no-report`."
        return Section(name, title, [text])
    selector, number = vision.selector, curves[0].pictures
    of = f"the mean of {count(number, 'picture')}" if number > 1 else "of one picture"
    lead = [
        f"How much of the variance of the {vision.tokens} tokens (hidden state {vision.tap}, {vision.channels} "
        f"channels) lies in how few directions; {of} ({curves[0].source}). The steeper, the fewer tokens say the same."
    ]
    if selector.rank is not None and selector.variance is None:
        own = next((curve for curve in curves if curve.centre == selector.centre), curves[0])
        share = own.curve[min(selector.rank, len(own.curve)) - 1]
        centred = "centred" if own.centre else "raw"
        lead.append(
            f"The selector scores by {selector.rank} directions, which hold {percent(share)} of the variance of the "
            f"{centred} tokens."
        )
    tables = [_ranks(curves)]
    if found:
        lead.append(f"From the calibration of this export: {found.pictures}. {_sentence(found.criterion)}")
        if found.ranks:
            tables.append(_taps(found))
    return Section(name, title, lead, charts=[line_chart(_energy_chart(vision, curves))], tables=tables)


def _energy_chart(vision: VisionInfo, curves: Sequence[Energy]) -> Lines:
    lines = [(_label(curve), curve.curve) for curve in curves]
    most = max(next((n for n, s in enumerate(c, 1) if s >= ALL_OF_IT), len(c)) for _, c in lines)
    low = min(curve[0] for _, curve in lines)
    rank = None if vision.selector.variance is not None else vision.selector.rank
    return Lines(
        "energy-chart",
        "Share of the variance against directions",
        "; ".join(f"{name}: {percent(c[0])} in the first direction" for name, c in lines) + ".",
        count_axis("directions", max(most, rank or 1, 2)),
        share_axis("share of the variance", max(0.0, low)),
        [Series(name, list(enumerate(curve[:most], 1))) for name, curve in lines],
        upright=[] if rank is None else [(rank, f"rank {rank}")],
    )


def _ranks(curves: Sequence[Energy]) -> Table:
    rows = [(_label(c), *(_reached(c.curve, level) for level in LEVELS)) for c in curves]
    columns = ("features", *(head(level) for level in LEVELS))
    return Table("Directions that hold a share of the variance", columns, rows)


def _reached(curve: Sequence[float], level: float) -> str:
    return str(next((n for n, share in enumerate(curve, 1) if share >= level - 1e-12), len(curve)))


def _label(curve: Energy) -> str:
    return "mean token subtracted" if curve.centre else "as they are"


def _taps(found: Calibrated) -> Table:
    levels = sorted({level for _, _, ranks in found.ranks for level in ranks}, key=float)
    rows = [
        (tap, "centred" if centre else "raw", *(str(ranks.get(level, NONE)) for level in levels))
        for tap, centre, ranks in found.ranks
    ]
    columns = ("tap", "features", *(head(float(level)) for level in levels))
    return Table("The same at every tap that was calibrated", columns, rows, words=(1,))


def agreement_section(manifest: Manifest, found: Agreement | None) -> Section:
    """The answers against the unpruned model's, at every K that was tried."""
    name, title = "agreement", "Agreement against K"
    if found is None:
        model = manifest.model.id
        text = (
            "This bundle's K was given, not searched for. `svdprune export MODEL --keep auto --agreement 0.98 --images "
            "DIR` finds the smallest K whose answers about your own pictures agree with those of the unpruned "
            f"{model}, and puts its curve here; `svdprune evaluate` on this bundle measures the agreement at its K."
        )
        return Section(name, title, [text])
    lead = [
        f"K = {found.keep} is the smallest at which {percent(found.wished)} or more of the answers are those of the "
        f"unpruned model, token for token, among the K that were measured: {count(found.questions, 'question')} about "
        f"{count(found.pictures, 'picture')} ({found.source})."
    ]
    if found.saving:
        save = found.saving
        line = (
            f"Counted for such a prompt, K = {found.keep} against all {found.tokens} tokens: prefill "
            f"{short(save.flops[0] / 1e9)} instead of {short(save.flops[1] / 1e9)} GFLOP "
            f"({times(save.flops[1], save.flops[0])}), KV cache {human_bytes(round(save.cache[0]))} instead of "
            f"{human_bytes(round(save.cache[1]))}"
        )
        if save.seconds:
            line += (
                f"; modelled on {manifest.target}, not measured: prefill {milliseconds(save.seconds[0])} instead of "
                f"{milliseconds(save.seconds[1])}"
            )
        lead.append(f"{line}.")
    if found.graph:
        lead.append(_exported(manifest, found))
    notes = ["The bars of the curve and the ranges in the table are 95 % intervals."]
    if found.unmeasured:
        notes.append(f"The whole bundle was not asked at export: {found.unmeasured}.")
    if found.irregular:
        keeps = ", ".join(map(str, found.irregular))
        notes.append(f"The curve is not monotonic: K = {keeps} agrees too, but a larger K does not.")
    chart = line_chart(_agreement_chart(found))
    return Section(name, title, lead, charts=[chart], tables=[_points(found)], notes=notes)


def _exported(manifest: Manifest, found: Agreement) -> str:
    """What became of the agreement in the files of the bundle."""
    last, failed = found.graph[-1], found.graph[:-1]
    text = (
        f"The curve is of the selector in float32. With the exported vision graph ({manifest.vision.precision}) "
        f"{percent(last.agreement)} of the answers are the same"
    )
    if failed:
        text += "; K was raised for that from " + ", ".join(
            f"{point.keep} ({percent(point.agreement)})" for point in failed
        )
    if found.bundle is not None:
        text += (
            f"; with the exported decoder ({manifest.decoder.precision}) as well, by ONNX Runtime, "
            f"{percent(found.bundle.agreement)}"
        )
    return f"{text}."


def _agreement_chart(found: Agreement) -> Lines:
    points = found.points
    series = [
        Series(
            "same answer as unpruned", [(p.keep, p.agreement) for p in points], [(p.low, p.high) for p in points], True
        )
    ]
    known = [(p.keep, p.accuracy) for p in points if p.accuracy is not None]
    if known:
        series.append(Series("right answer", known, markers=True))
    lowest = min([p.low for p in points] + [value for _, value in known])
    keeps = [p.keep for p in points]
    axis = count_axis("vision tokens kept", found.tokens, keeps)
    return Lines(
        "agreement-chart",
        "Answers against the tokens kept",
        "; ".join(f"K = {p.keep}: {percent(p.agreement)} the same" for p in points) + ".",
        Axis(axis.title, axis.low, max(keeps), axis.ticks, log=True),
        share_axis("answers", max(0.0, lowest)),
        series,
        across=[(found.wished, f"wished: {percent(found.wished)}")],
        upright=[(found.keep, f"K = {found.keep}")],
    )


def _points(found: Agreement) -> Table:
    labelled = any(p.accuracy is not None for p in found.points)
    rows = []
    for p in found.points:
        row = [str(p.keep), f"{percent(p.agreement)} ({percent(p.low, 0)} to {percent(p.high, 0)})"]
        row += [percent(p.matched), short(p.kl)]
        rows.append(row + ([NONE if p.accuracy is None else percent(p.accuracy)] if labelled else []))
    if labelled and found.unpruned_accuracy is not None:
        rows.append([f"all {found.tokens}", NONE, NONE, NONE, percent(found.unpruned_accuracy)])
    columns = ["K", "same answers", "tokens before they differ", "KL of the first token, nats"]
    columns += ["right answers"] if labelled else []
    return Table("Answers at every K that was measured", columns, rows)


def quantisation_section(vision: VisionInfo) -> Section:
    """What 8 bits changed."""
    name, title, info = "quantisation", "Quantisation", vision.quantisation
    if info is None:
        text = f"The vision graph is {vision.precision}: it is not quantised. `--precision int8` or `fp8` would be."
        return Section(name, title, [text])
    facts = Table("What it changed, against the float graph", ("", ""), quantisation_facts(info), words=(1,))
    tables = [facts]
    if info.sensitivity:
        rows = [
            (one.block, percent(1 - one.overlap, 2), f"{1 - one.cosine:.2e}", percent(one.scores, 2),
             info.float_type if one.block in info.float_blocks else vision.precision)
            for one in info.sensitivity
        ]  # fmt: skip
        columns = ("block", "kept tokens that change", "1 - cosine", "scores that move", "is now")
        tables.append(Table("Each block quantised alone, worst first", columns, rows, words=(4,)))
    return Section(name, title, tables=tables)


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")
