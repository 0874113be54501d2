"""Print the `polygraphy` and `trtexec` lines that do to a bundle's graphs what `svdprune build` and `profile` do.

    python -m tools.trt_commands BUNDLE --tensorrt 10 --dir trt

The lines build an engine (strongly typed, TF32 off, the shapes of `svdprune build`), time it on the bundle's golden
input, which is written into --dir for them, and dump what every layer is and takes. What Polygraphy's own argument
parser does not accept is an error here. Needs no TensorRT.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines.key import PARTS
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.lazy import require
from svdprune.runtime.targets import find_target
from tools.trt_jobs import Job, jobs_of, write_inputs

RELEASES = ("10", "11", "rtx")
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1"
WARM_UP_MS = 500  # trtexec counts its warm-up in time, not in runs

# Polygraphy leaves TF32 on for TensorRT-RTX, and has no option for the GPU to build for.
RTX_CONFIG = '''"""For `--trt-config-postprocess-script` with TensorRT-RTX; by tools/trt_commands.py."""

import tensorrt_rtx as trt


def postprocess_config(builder, network, config):
    """TF32 off; the GPU of the bundle's target, where TensorRT-RTX builds for it."""
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.ComputeCapability, "SM{sm}"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM{sm}, 0)
'''


def polygraphy_lines(job: Job, release: str, folder: Path, warm_up: int) -> list[list[str]]:
    """`polygraphy run`, which builds, times and compares, and `polygraphy inspect`, which lists the engine's layers."""
    engine, place = str(folder / f"{job.name}.engine"), folder / job.name
    run = ["polygraphy", "run", str(job.graph), "--trt"]
    if job.cosine is not None:
        run += ["--onnxrt", "--compare", "cosine_similarity", "--cosine-similarity-threshold", str(job.cosine)]
    # A network of TensorRT-RTX is strongly typed whatever one says.
    run += ["--trt-config-postprocess-script", str(folder / "rtx.py")] if release == "rtx" else ["--strongly-typed"]
    for profile in job.profiles:
        for option, which in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = (f"{name}:[{','.join(map(str, sizes[which]))}]" for name, sizes in profile.items())
            run += [f"--trt-{option}-shapes", *shapes]
    if len(job.profiles) > 1:
        run += ["--optimization-profile", str(job.profile)]
    run += ["--profiling-verbosity", "detailed", "--save-engine", engine]
    run += ["--data-loader-script", str(place / "load.py"), "--sequential-runners", "--warm-up", str(warm_up)]
    inspect = ["polygraphy", "inspect", "model", engine, "--model-type", "engine", "--show", "layers", "attrs"]
    return [run, inspect]


def trtexec_line(job: Job, release: str, folder: Path, runs: int) -> list[str]:
    """`trtexec`, which builds, times with percentiles, and dumps layers and their times."""
    place, base = folder / job.name, folder / job.name
    line = ["trtexec", f"--onnx={job.graph}", f"--saveEngine={base}.trtexec.engine", "--noTF32"]
    line += ["--stronglyTyped"] if release == "10" else []  # TensorRT 11 has no other way
    profile = job.profiles[job.profile]  # trtexec makes one profile
    for option, which in (("min", 0), ("opt", 1), ("max", 2)):
        shapes = (f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in profile.items())
        line.append(f"--{option}Shapes={','.join(shapes)}")
    line.append("--shapes=" + ",".join(f"{name}:{'x'.join(map(str, job.inputs[name].shape))}" for name in profile))
    line.append("--loadInputs=" + ",".join(f"{name}:{place / name}.bin" for name in job.inputs))
    line += [f"--iterations={runs}", f"--warmUp={WARM_UP_MS}", "--percentile=50,90,99", "--useCudaGraph"]
    line += ["--profilingVerbosity=detailed", "--dumpProfile", f"--exportProfile={base}.profile.json"]
    return [*line, "--dumpLayerInfo", f"--exportLayerInfo={base}.layers.json", "--separateProfileRun"]


def rtx_line(job: Job, folder: Path) -> list[str]:
    """`polygraphy convert` on TensorRT-RTX: builds, and needs no GPU for it."""
    run = polygraphy_lines(job, "rtx", folder, 0)[0]
    options = run[run.index("--trt-config-postprocess-script") : run.index("--profiling-verbosity")]
    if "--optimization-profile" in options:
        options = options[: options.index("--optimization-profile")]
    return [
        "polygraphy",
        "convert",
        str(job.graph),
        "--convert-to",
        "trt",
        *options,
        "-o",
        f"{folder / job.name}.rtx.engine",
    ]


def check(line: list[str]) -> None:
    """Refuse a Polygraphy line that its own argument parser does not take.

    Raises:
        SvdpruneError: with what the parser said. MissingDependency: Polygraphy is not installed.
    """
    tools = require("polygraphy.tools.registry", extra="profile", feature="tools.trt_commands").TOOL_REGISTRY
    logger = require("polygraphy.logger").G_LOGGER
    failure = require("polygraphy.exception").PolygraphyException
    parser = argparse.ArgumentParser(prog="polygraphy")
    choices = parser.add_subparsers(dest="tools", required=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), logger.verbosity(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how Polygraphy looks for its plugins
            for tool in tools:
                tool.setup_parser(choices)
            arguments, unknown = parser.parse_known_args(line[1:])
            if not unknown:
                arguments.subcommand.parse(arguments)
    except (SystemExit, failure) as error:
        reason = said.getvalue().strip().splitlines() or [str(error)]
        raise SvdpruneError(f"Polygraphy does not take this line ({reason[-1]}): {shlex.join(line)}") from error
    if unknown:
        raise SvdpruneError(f"Polygraphy does not know {' '.join(unknown)}: {shlex.join(line)}")


def lines_of(job: Job, release: str, folder: Path, runs: int, warm_up: int) -> Iterator[str]:
    """All lines for one job, each checked as far as it can be."""
    yield f"# {job.title}; TensorRT{'-RTX' if release == 'rtx' else f' {release}'}"
    yield from (f"# {note}" for note in job.notes)
    prefix = f"{RTX} " if release == "rtx" else ""
    if release == "rtx":
        check(build := rtx_line(job, folder))
        yield prefix + shlex.join(build) + "  # needs no GPU"
    for line in polygraphy_lines(job, release, folder, warm_up):
        check(line)
        yield prefix + shlex.join(line)
    if release != "rtx":
        yield shlex.join(trtexec_line(job, release, folder, runs))


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tensorrt", "releases", multiple=True, type=click.Choice(RELEASES), default=RELEASES, show_default=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[default: those the bundle has]")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path("trt"), show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Most pictures at once.")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--warm-up", type=click.IntRange(min=0), default=3, show_default=True)
def main(
    bundle: Path, releases: tuple[str, ...], parts: tuple[str, ...], folder: Path, batch: int, runs: int, warm_up: int
) -> None:
    try:
        opened = open_bundle(bundle, verify=False)
        engine = opened.manifest.decoder.engine is not None
        jobs = [
            job
            for part in parts or PARTS
            if parts or part == "vision" or engine
            for job in jobs_of(opened, part, batch)
        ]
        for job in jobs:
            write_inputs(job, folder, runs)
        (folder / "rtx.py").write_text(RTX_CONFIG.format(sm=find_target(opened.manifest.target).sm), encoding="utf-8")
        blocks = ["\n".join(lines_of(job, name, folder, runs, warm_up)) for name in releases for job in jobs]
    except SvdpruneError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n\n".join(blocks))


if __name__ == "__main__":
    main()
