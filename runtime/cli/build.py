"""``svdprune build``: engines for this machine, or, with TensorRT-RTX, the proof that a graph builds for another."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdprune.runtime.cli.app import INTERRUPTED, Command
from svdprune.runtime.cli.show import Steps, human_bytes, print_json, print_table
from svdprune.runtime.errors import UserError

if TYPE_CHECKING:
    from svdprune.runtime.engines.build import BuildReport, PartResult


@click.command("build", cls=Command, short_help="Build TensorRT engines from a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="bundle", show_default="its own", metavar="NAME", help="`auto`: this machine.")
@click.option("--runtime", default="auto", show_default=True, metavar="NAME", help="tensorrt, tensorrt_rtx or auto.")
@click.option("--part", default="all", show_default=True, metavar="NAME", help="vision, decoder or all.")
@click.option("--workspace", type=float, metavar="GIB", help="Most scratch memory.  [default: no limit]")
@click.option("--batch", default="1,1,1", show_default=True, metavar="MIN,OPT,MAX", help="Pictures at a time.")
@click.option("--level", type=int, metavar="N", help="Optimisation level, 0 to 5: 5 builds longest.  [default: 3]")
@click.option("--version-compatible", is_flag=True, help="Engines that later releases of this major version load, too.")
@click.option("--force", is_flag=True, help="Build anew where a fitting engine is there.")
@click.option("--no-preflight", is_flag=True, help="Try even what the estimate says will not fit.")
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Keep what TensorRT says.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path,
    target: str,
    runtime: str,
    part: str,
    workspace: float | None,
    batch: str,
    level: int | None,
    version_compatible: bool,
    force: bool,
    no_preflight: bool,
    log: Path | None,
    as_json: bool,
) -> None:
    """Build the engines of BUNDLE and keep them inside it; an engine that fits already is reused.

    Full TensorRT builds for the GPU of this machine. TensorRT-RTX also builds for RTX GPUs that are elsewhere, on a
    CPU: that shows that the graph builds, and says nothing of TensorRT or of a Jetson. Where the GPU is, the golden
    case is replayed, and an engine that fails it is not kept.
    """
    from svdprune.runtime.engines.build import BuildRequest, build_engines
    from svdprune.runtime.engines.key import BuildOptions
    from svdprune.runtime.engines.watch import at_work

    options = BuildOptions(
        batch=_three(batch),
        workspace=None if workspace is None else int(workspace * 2**30),
        level=level,
        version_compatible=version_compatible,
    )
    request = BuildRequest(target, runtime, part, options, force, not no_preflight, log)
    try:
        with Steps() as steps:
            report = build_engines(bundle, request, steps)
    except KeyboardInterrupt:
        if at_work():  # the second Ctrl-C; nothing of the build is on the disk yet
            click.echo("\nsvdprune: stopped", err=True)
            os._exit(INTERRUPTED)
        raise
    if as_json:
        print_json(_json(report))
    else:
        _print(report)


def _three(text: str) -> tuple[int, int, int]:
    """"1,4,8" as numbers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--batch is {text!r}, it must be three numbers with commas: MIN,OPT,MAX, such as 1,1,4")
    least, likely, most = (int(part) for part in parts)
    return least, likely, most


def _json(report: BuildReport) -> dict[str, Any]:
    """The report as plain values; each part with what its ``build.json`` says."""
    parts = [
        {
            "part": item.part,
            "state": item.state,
            "stale": item.stale,
            "file": str(item.engine.path),
            "build": item.engine.info,
            "preflight": [dataclasses.asdict(check) for check in item.checks],
        }
        for item in report.parts
    ]
    return {
        "bundle": report.bundle,
        "target": report.target,
        "runtime": report.runtime,
        "parts": parts,
        "notes": report.notes,
    }


def _print(report: BuildReport) -> None:
    for item in report.parts:
        for check in item.checks:
            mark = {"ok": "", "unknown": "? "}.get(check.state, "! ")
            advice = f": {check.advice}" if check.advice else ""
            click.echo(f"{mark}{check.name}: {check.found}{advice}")
        print_table(("", f"{item.part} engine, {report.runtime}, for {report.target}"), _facts(item))
    for note in report.notes:
        click.echo(note)


def _facts(item: PartResult) -> list[tuple[str, str]]:
    """One engine for a person."""
    info, key = item.engine.info, item.engine.key
    state = item.state
    if item.state == "reused":
        state = f"reused, built {info['built'][:16].replace('T', ' ')} UTC from the same graph with the same options"
    elif item.stale:
        state = f"rebuilt, the one before was stale: {item.stale}"
    return [
        ("state", state),
        ("file", str(item.engine.path)),
        ("size", f"{human_bytes(info['bytes'])} from a graph of {human_bytes(info['graph_bytes'])}"),
        ("build", f"{info['seconds']:.1f} s, {info['cpu_seconds']:.1f} s of CPU, {memory_words(info['peak_memory'])}"),
        ("layers", "not known without the GPU" if info["layers"] is None else str(info["layers"])),
        ("made for", ", ".join([f"sm {key.sm}", *(f"{name} {value}" for name, value in key.options.items())])),
        ("self-test", info["selftest"]),
    ]


def memory_words(peak: dict[str, int | None]) -> str:
    """The measured memory of a build in words."""
    names = {"added": "memory added to the process", "device": "of the GPU", "machine": "of the machine's memory"}
    said = [f"{human_bytes(size)} {words}" for name, words in names.items() if (size := peak.get(name)) is not None]
    return ", ".join(said) or "memory not measured"
