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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from svdprune.runtime.bundle import Bundle, open_bundle
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.engines.build import profiles_of
from svdprune.runtime.engines.key import PARTS, BuildOptions, Profile
from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.positions import Layout, picture_place, policy_named, splice
from svdprune.runtime.preprocess import ImageSettings, normalise, open_image, preprocess
from svdprune.runtime.verify_golden import read_golden
from svdprune.runtime.verify_metrics import VISION_LIMITS, limits_for

RELEASES = ("10", "11", "rtx")
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1"
WARM_UP_MS = 500  # trtexec counts its warm-up in time, not in runs

LOADER = '''"""Inputs of the golden case for `polygraphy run --data-loader-script`; by tools/trt_commands.py."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def load_data():
    """The same input {runs} times: the times of runs are averaged."""
    inputs = {{name: np.load(HERE / f"{{name}}.npy") for name in {names}}}
    inputs |= {{name: np.zeros(shape, np.{dtype}) for name, shape in {empty}.items()}}  # an empty KV cache
    for _ in range({runs}):
        yield inputs
'''


@dataclass(frozen=True)
class Job:
    """One engine in one use.

    Attributes:
        name: of its files ("vision", "decoder-prefill").
        title: for a person.
        graph: the ONNX file.
        profiles: optimisation profiles; ``profile`` is the one in use.
        inputs: real inputs by name.
        empty: shapes of inputs that start as zeros, of ``dtype``: the KV cache.
        cosine: least cosine with ONNX Runtime; None where that does not run the graph.
        notes: what to know before trusting a figure.
    """

    name: str
    title: str
    graph: Path
    profiles: list[Profile]
    profile: int
    inputs: Mapping[str, np.ndarray]
    empty: Mapping[str, tuple[int, ...]]
    dtype: str
    cosine: float | None
    notes: tuple[str, ...] = ()


def jobs_of(bundle: Bundle, part: str, batch: int) -> list[Job]:
    """What there is to run: the vision graph once, the decoder's engine graph for prefill and for a decoding step.

    Raises:
        UserError: the bundle has no such graph.
    """
    return [_vision(bundle, batch)] if part == "vision" else _decoder(bundle)


def _vision(bundle: Bundle, batch: int) -> Job:
    info, golden = bundle.manifest.vision, read_golden(bundle)
    name = bundle.manifest.processor.image
    settings = ImageSettings.from_json(bundle.read_json(name), name)
    pixels = preprocess(open_image(golden.picture), settings)
    feed = np.ascontiguousarray(pixels if info.input == "uint8" else normalise(pixels, settings))
    shapes = profiles_of(bundle, "vision", BuildOptions((1, 1, batch)), {"pixels": (-1, *feed.shape)})
    cosine = limits_for(VISION_LIMITS, info.precision).cosine
    return Job(
        "vision",
        "vision graph, one picture",
        bundle.file(info.file),
        shapes,
        0,
        {"pixels": feed[None]},
        {},
        "float32",
        cosine,
    )


def _decoder(bundle: Bundle) -> list[Job]:
    info, golden = bundle.manifest.decoder, read_golden(bundle)
    if info.engine is None:
        reason = info.engine_refused or "it was exported without one"
        raise UserError(f"{bundle.path} has no decoder graph for engines ({reason}): ask for --part vision")
    embed = Embedding(bundle.file(info.embedding), info.vocab, info.hidden)
    ids = golden.prompt_ids
    place = picture_place(ids, bundle.manifest.processor.image_token_id)
    layout = Layout(place, golden.kept, bundle.manifest.vision.tokens, policy_named(golden.positions))
    prompt, positions = splice(ids, place, golden.features, embed), layout.span(0, len(ids))
    token = embed(golden.answer_ids[:1] or [info.eos[0]])
    varying = {"inputs_embeds": (1, -1, info.hidden), "position_ids": (1, -1)}
    profiles = profiles_of(bundle, "decoder", BuildOptions(), varying)
    cache = (1, info.kv_heads, info.engine.cache, info.head_dim)
    empty = {f"past.{i}.{end}": cache for i in range(info.layers) for end in ("key", "value")}
    notes = (
        "The graph updates its cache in place: each present.* wants the memory of its past.*, which svdprune binds so.",
        "Whether these tools do depends on their release and was not tried. Needs TensorRT 10.15 or newer.",
    )
    jobs = []
    for index, (name, title, rows, at, written) in enumerate(
        (
            ("prefill", f"prefill of the golden prompt, {len(prompt)} rows", prompt, positions, 0),
            ("decode", "one decoding step after it", token, layout.span(len(ids), len(ids) + 1), len(prompt)),
        )
    ):
        inputs = {
            "inputs_embeds": np.ascontiguousarray(rows[None], np.float32),
            "position_ids": np.ascontiguousarray(at[None], np.int64),
            "write_index": np.array([written], np.int64),
        }
        dtype = {"fp16": "float16", "fp32": "float32"}[info.engine.precision]
        graph = bundle.file(info.engine.file)
        jobs.append(
            Job(f"decoder-{name}", f"decoder, {title}", graph, profiles, index, inputs, empty, dtype, None, notes)
        )
    return jobs


def write_inputs(job: Job, folder: Path, runs: int) -> None:
    """Write a job's inputs into ``folder/<name>``: .npy and a loader for Polygraphy, raw .bin for trtexec."""
    place = folder / job.name
    place.mkdir(parents=True, exist_ok=True)
    for name, array in job.inputs.items():
        np.save(place / f"{name}.npy", array)
        array.tofile(place / f"{name}.bin")
    text = LOADER.format(runs=runs, names=tuple(job.inputs), empty=dict(job.empty), dtype=job.dtype)
    (place / "load.py").write_text(text, encoding="utf-8")


def polygraphy_lines(job: Job, release: str, folder: Path, warm_up: int) -> list[list[str]]:
    """`polygraphy run`, which builds, times and compares, and `polygraphy inspect`, which lists the engine's layers."""
    engine, place = str(folder / f"{job.name}.engine"), folder / job.name
    run = ["polygraphy", "run", str(job.graph), "--trt"]
    if job.cosine is not None:
        run += ["--onnxrt", "--compare", "cosine_similarity", "--cosine-similarity-threshold", str(job.cosine)]
    if release != "rtx":  # a network of TensorRT-RTX is strongly typed whatever one says
        run += ["--strongly-typed"]
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
    shapes = run[run.index("--trt-min-shapes") : run.index("--profiling-verbosity")]
    if "--optimization-profile" in shapes:
        shapes = shapes[: shapes.index("--optimization-profile")]
    return [
        "polygraphy",
        "convert",
        str(job.graph),
        "--convert-to",
        "trt",
        *shapes,
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
        blocks = ["\n".join(lines_of(job, name, folder, runs, warm_up)) for name in releases for job in jobs]
    except SvdpruneError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n\n".join(blocks))


if __name__ == "__main__":
    main()
