"""What ``svdprune export`` says at the end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from svdprune.runtime.cli.show import human_bytes, quantisation_facts

if TYPE_CHECKING:
    from svdprune.calib.keep_curve import KeepCurve
    from svdprune.exporter.calibrate.apply import Chosen
    from svdprune.exporter.request import ExportSummary
    from svdprune.runtime.targets import Target


def print_summary(summary: ExportSummary, target: Target, here: bool) -> None:
    """What was made, where it is, and the next command to type; ``here``: this machine is the target."""
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in summary.sizes.items() if name != "bundle")
    click.echo(f"vision tokens  {summary.tokens} -> {summary.keep} ({summary.keep / summary.tokens:.1%})")
    if summary.selector and summary.selector.calibration:
        _print_calibration(summary.selector)
    elif summary.selector:
        click.echo(f"selector       {summary.selector.config.name}")
    if summary.curve:
        _print_curve(summary.curve)
    click.echo(f"size           {human_bytes(summary.sizes['bundle'])} ({parts})")
    if summary.shared:
        click.echo(f"shared         the decoder's files with {summary.shared}, on the disk once")
    if summary.quantisation:
        for name, fact in quantisation_facts(summary.quantisation):
            click.echo(f"{name:<15}{fact}")
    if summary.cache:
        click.echo(f"KV cache       {summary.cache} rows in a decoder engine")
    if summary.engine_refused:
        click.echo(f"note           {summary.engine_refused}")
    click.echo(f"time           {sum(summary.seconds.values()):.1f} s")
    click.echo(f"bundle         {summary.bundle}")
    if summary.report:
        click.echo(f"report         {summary.bundle / summary.report}")
    bundle = shlex.quote(str(summary.bundle))
    if target.releases and not here:
        script = shlex.quote(f"{summary.bundle.resolve().name}/build.sh")
        click.echo(f"next           copy {bundle} to the {target.device} and run there: sh {script}")
    elif target.releases:
        click.echo(f"next           svdprune build {bundle}")
    else:
        click.echo(f"next           svdprune run {bundle} --image PICTURE --prompt QUESTION")


def _print_calibration(chosen: Chosen) -> None:
    """The settings, and what was given instead of the calibration's."""
    fields = chosen.manifest_fields()
    settings = ", ".join(
        f"{name} {fields[name]}" for name in ("rank", "variance", "block", "iterations") if fields[name] is not None
    )
    centred = "centred" if fields["centre"] else "raw"
    click.echo(f"selector       {chosen.config.name}, {settings}, {centred}, calibrated start")
    for note in chosen.notes:
        click.echo(f"note           {note}")


def _print_curve(curve: KeepCurve) -> None:
    """Agreement at the chosen K, and what it saves."""
    point, saving = curve.chosen, curve.saving
    accuracy = ""
    if point.accuracy is not None and curve.unpruned_accuracy is not None:
        accuracy = f", accuracy {point.accuracy:.3f} (unpruned {curve.unpruned_accuracy:.3f})"
    click.echo(
        f"agreement      {point.agreement:.3f} ({point.low:.2f}-{point.high:.2f}) of {curve.source.questions} answers, "
        f"wished {curve.wished:g}; KL {point.kl:.3f}{accuracy}"
    )
    if curve.graph:
        line = f"exported       {curve.graph[-1].agreement:.3f} with the vision graph in {curve.precision}"
        if curve.bundle:
            line += f", {curve.bundle.agreement:.3f} with the decoder in {curve.decoder} as well"
        click.echo(line)
    if curve.unmeasured:
        click.echo(f"note           the whole bundle was not asked: {curve.unmeasured}")
    elif curve.bundle and curve.bundle.agreement < curve.wished:
        click.echo("note           the exported decoder agrees less than was wished, which a larger K does not mend")
    if saving:
        prefill = f"prefill {saving.flops[0] / 1e9:,.1f} instead of {saving.flops[1] / 1e9:,.1f} GFLOP"
        prefill += f" ({saving.flops[0] / saving.flops[1] - 1:+.0%})"
        if saving.seconds:
            prefill += f", {saving.seconds[0] * 1e3:.1f} instead of {saving.seconds[1] * 1e3:.1f} ms"
        cache = f"KV cache {human_bytes(saving.cache[0])} instead of {human_bytes(saving.cache[1])}"
        click.echo(f"saved          {prefill}, {cache}: an estimate for {curve.prompt_tokens} tokens of text")
