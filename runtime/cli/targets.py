"""``svdprune targets``: the table of deployment targets, or all of one. It fits a window of 80 columns."""

from __future__ import annotations

import textwrap

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import print_json, print_table
from svdprune.runtime.machine import resolve_target
from svdprune.runtime.targets import AUTO, TARGETS, Release, Target, check_precision
from svdprune.runtime.traps import TRAPS, Trap, parse_version

WIDTH = 80
_DEVICES = ("target", "device", "sm", "memory GB", "GB/s", "TensorRT")
_PEAKS = ("target", "fp16", "int8", "fp8", "fp4", "precisions")


@click.command("targets", cls=Command, short_help="Where a bundle can run: the table of targets.")
@click.argument("name", required=False)
@click.option("--precision", metavar="NAME", help="Say whether NAME's target runs this precision, or why not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, precision: str | None, as_json: bool) -> None:
    """List the deployment targets, or everything about the target NAME ("auto" is this machine)."""
    if name is not None:
        found = resolve_target(name)
        if precision is not None:
            check_precision(found.target, precision)
        if as_json:
            print_json({**found.target.to_dict(), "found": found.found})
        else:
            if name == AUTO:
                click.echo(f"this machine: {found.found}, so the target is {found.target.name}")
            _print_one(found.target)
        return
    if precision is not None:
        raise click.UsageError("--precision asks about one target: name it")
    if as_json:
        print_json([target.to_dict() for target in TARGETS.values()])
        return
    print_table(_DEVICES, [_device(target) for target in TARGETS.values()], tight=True)
    click.echo()
    print_table(_PEAKS, [_peaks(target) for target in TARGETS.values()], tight=True)
    click.echo("\nDense peaks: fp16, fp8, fp4 in TFLOPS, int8 in TOPS; -: unknown, or not there.")
    click.echo("More about one: svdprune targets NAME. This machine: svdprune targets auto.")
    click.echo("What can be exported for them, and what was checked: svdprune models.")


def _device(target: Target) -> tuple[str, ...]:
    memory = "-" if target.memory_gb is None else f"{target.memory_gb}{' shared' if target.memory_shared else ''}"
    versions = [release.tensorrt for release in target.releases]
    span = f"{versions[0]}-{versions[-1]}" if versions else "-"
    return target.name, target.device, _or_dash(target.sm), memory, _or_dash(target.bandwidth_gbs), span


def _peaks(target: Target) -> tuple[str, ...]:
    peaks = (target.fp16_tflops, target.int8_tops, target.fp8_tflops, target.fp4_tflops)
    return (target.name, *map(_or_dash, peaks), " ".join(target.precisions))


def _print_one(target: Target) -> None:
    memory = "-" if target.memory_gb is None else f"{target.memory_gb} GB{' shared' if target.memory_shared else ''}"
    rows = [
        ("target", target.name),
        ("device", target.device),
        ("sm", _or_dash(target.sm)),
        ("memory", memory),
        ("bandwidth", _or_dash(target.bandwidth_gbs, "GB/s")),
        ("fp16 peak", _or_dash(target.fp16_tflops, "TFLOPS, dense")),
        ("int8 peak", _or_dash(target.int8_tops, "TOPS, dense")),
        ("fp8 peak", _or_dash(target.fp8_tflops, "TFLOPS, dense")),
        ("fp4 peak", _or_dash(target.fp4_tflops, "TFLOPS, dense")),
        ("precisions", ", ".join(target.precisions)),
        ("opset", "-" if target.opset_ceiling is None else f"up to {target.opset_ceiling}, for all its software"),
        ("TensorRT-RTX", "builds for it, without a GPU too" if target.tensorrt_rtx else "does not build for it"),
        ("note", target.note or "-"),
        ("source", target.source or "-"),
    ]
    for name, value in rows if target.releases else rows[:11] + rows[12:]:
        _print_wrapped(f"{name:<14}{value}", 14)
    if not target.releases:
        return
    print_table(
        ("release", "TensorRT", "CUDA", "Python", "opset"),
        [(r.name, r.tensorrt, _or_dash(r.cuda), _or_dash(r.python), str(r.opset)) for r in target.releases],
    )
    click.echo("What its parser of ONNX does not take; an export is checked for it:")
    for trap in TRAPS:
        holding = [release for release in target.releases if trap.holds(parse_version(release.tensorrt))]
        if holding or (trap.rtx_only and target.tensorrt_rtx):
            _print_wrapped(f"  {trap.name:<21}{trap.sentence} {_where(trap, holding, target)}".rstrip(), 23)


def _where(trap: Trap, holding: list[Release], target: Target) -> str:
    """The releases that a rule holds for, where those are not all."""
    if trap.rtx_only:
        return "[TensorRT-RTX]"
    if len(holding) == len(target.releases):
        return ""
    return f"[{', '.join(release.name for release in holding)}]".replace(" ", "\N{NO-BREAK SPACE}")


def _print_wrapped(line: str, indent: int) -> None:
    filled = textwrap.fill(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    click.echo(filled.replace("\N{NO-BREAK SPACE}", " "))


def _or_dash(value: object, unit: str = "") -> str:
    return "-" if value is None else f"{value} {unit}".rstrip()
