"""``svdprune targets``: the table of deployment targets, or all of one."""

from __future__ import annotations

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import print_json, print_table
from svdprune.runtime.machine import resolve_target
from svdprune.runtime.targets import AUTO, TARGETS, Target

_COLUMNS = ("target", "device", "sm", "memory", "GB/s", "fp16", "int8", "fp8", "fp4", "software", "opset", "precisions")


@click.command("targets", cls=Command, short_help="Where a bundle can run: the table of targets.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the deployment targets, or everything about the target NAME ("auto" is this machine)."""
    if name is not None:
        found = resolve_target(name)
        if as_json:
            print_json({**found.target.to_dict(), "found": found.found})
        else:
            if name == AUTO:
                click.echo(f"this machine: {found.found}, so the target is {found.target.name}")
            _print_one(found.target)
        return
    if as_json:
        print_json([target.to_dict() for target in TARGETS.values()])
        return
    print_table(_COLUMNS, [_row(target) for target in TARGETS.values()])
    click.echo("fp16, fp8, fp4: dense TFLOPS; int8: dense TOPS; opset: the highest for all its software; -: unknown.")
    click.echo("More about one: svdprune targets NAME. This machine: svdprune targets auto.")


def _row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        target.device,
        _or_dash(target.sm),
        _memory(target),
        _or_dash(target.bandwidth_gbs),
        _or_dash(target.fp16_tflops),
        _or_dash(target.int8_tops),
        _or_dash(target.fp8_tflops),
        _or_dash(target.fp4_tflops),
        ", ".join(release.name for release in target.releases) or "-",
        _or_dash(target.opset_ceiling),
        " ".join(target.precisions),
    )


def _print_one(target: Target) -> None:
    print_table(
        ("", target.name),
        [
            ("device", target.device),
            ("sm", _or_dash(target.sm)),
            ("memory", _memory(target)),
            ("bandwidth", _or_dash(target.bandwidth_gbs, "GB/s")),
            ("fp16 peak", _or_dash(target.fp16_tflops, "TFLOPS, dense")),
            ("int8 peak", _or_dash(target.int8_tops, "TOPS, dense")),
            ("fp8 peak", _or_dash(target.fp8_tflops, "TFLOPS, dense")),
            ("fp4 peak", _or_dash(target.fp4_tflops, "TFLOPS, dense")),
            ("precisions", ", ".join(target.precisions)),
            ("opset ceiling", _or_dash(target.opset_ceiling)),
            ("note", target.note or "-"),
        ],
    )
    if target.releases:
        print_table(
            ("release", "TensorRT", "CUDA", "Python", "opset"),
            [
                (
                    release.name,
                    _or_dash(release.tensorrt),
                    _or_dash(release.cuda),
                    _or_dash(release.python),
                    _or_dash(release.opset),
                )
                for release in target.releases
            ],
        )
        click.echo("Operators that need care:")
        for release in target.releases:
            own = [trap for trap in release.traps if not all(trap in other.traps for other in target.releases)]
            for trap in own:
                click.echo(f"  {trap} [{release.name}]")
        for trap in target.traps:
            if all(trap in release.traps for release in target.releases):
                click.echo(f"  {trap}")


def _or_dash(value: object, unit: str = "") -> str:
    return "-" if value is None else f"{value} {unit}".rstrip()


def _memory(target: Target) -> str:
    if target.memory_gb is None:
        return "-"
    return f"{target.memory_gb} GB{' shared' if target.memory_shared else ''}"
