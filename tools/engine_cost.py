"""What the selection costs an engine: the pruned and the unpruned vision graph, built by TensorRT-RTX on a CPU.

    python -m tools.engine_cost --model vit-l --model mini-llava --write docs/engines.md

`vit-l` is the vision tower and projector of LLaVA-1.5-7B's shapes with random weights (made by tools/memory.py),
`mini-llava` the shipped model. Both graphs of a model are exported here: `--select leverage` keeping 32 tokens, and
`--select none`. Each build runs in a process of its own, so that its memory is its own; of `--repeat` builds, taken in
turn, the quickest counts. The seconds of CPU hold where other programs slow the clock's. No engine is run, and
TensorRT-RTX is neither TensorRT nor a Jetson.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.key import Sizes
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.engines.watch import MemoryWatch, run_watched
from svdprune.runtime.targets import find_target
from tools.tables import write_between

MODELS = ("vit-l", "mini-llava")
KEEP = 32
SELECTIONS = ("leverage", "none")
_CHILD = "import sys; from tools.engine_cost import child; child(*sys.argv[1:])"


@dataclass(frozen=True)
class Build:
    """One build: sizes in bytes, seconds of the clock and of the CPU, fused layers, memory added to the process."""

    graph: int
    engine: int
    seconds: float
    cpu: float
    layers: int
    added: int


def vision_graph(model: str, select: str, precision: str, folder: Path) -> Path:
    """Export the vision graph of a model into ``folder`` (an empty one); gives its path."""
    import torch

    from svdprune.exporter.checkpoint import Checkpoint
    from svdprune.exporter.families import family_of
    from svdprune.exporter.selection import SelectorConfig
    from svdprune.exporter.source import shipped_folder
    from svdprune.exporter.vision import build_vision, save_graph
    from tools.memory import make_checkpoint

    torch.set_num_threads(1)
    source = shipped_folder()
    if model == "vit-l":
        source = folder.parent / "checkpoint"
        if not source.exists():
            source.mkdir()
            make_checkpoint(source)
    checkpoint = Checkpoint(str(source))
    family = family_of(checkpoint.config, model)
    spec = family.describe(checkpoint)
    keep = spec.tokens if select == "none" else KEEP
    graph = build_vision(checkpoint, family, spec, SelectorConfig(name=select), keep, precision=precision, gpu=True)
    save_graph(graph, folder / "vision.onnx")
    return folder / "vision.onnx"


def build_here(graph: Path, sm: int, workspace: int | None = None, batch: int = 1) -> Build:
    """Build an engine of a graph with TensorRT-RTX, in this process."""
    trt, log, progress = find_tensorrt("tensorrt_rtx"), BuildLog(), Progress()
    watch, began, processor = MemoryWatch(None), time.perf_counter(), time.process_time()
    network = trt.network_from_onnx(graph, log)

    def sizes(shape: tuple[int, ...]) -> Sizes:
        one, many = (tuple(count if size == -1 else size for size in shape) for count in (1, batch))
        return one, one, many

    profile = {name: sizes(shape) for name, shape in network.inputs.items() if -1 in shape}
    config = trt.config(network, [profile], sm=sm, workspace=workspace, monitor=trt.monitor(progress))
    data = run_watched(
        lambda: trt.build(network, config, log, progress, "building"), progress, watch, lambda step, share: None, ""
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - processor
    weights = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    return Build(weights, data.nbytes, seconds, cpu, log.layers, watch.result()["added"] or 0)


def child(graph: str, sm: str) -> None:
    """Build and print the figures as JSON: what each measured process runs."""
    click.echo(json.dumps(vars(build_here(Path(graph), int(sm)))))


def measure(graph: Path, sm: int) -> Build:
    """``build_here`` in a fresh process."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", _CHILD, str(graph), str(sm)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Build(**figures)


def rows(model: str, precision: str, builds: dict[str, list[Build]]) -> list[str]:
    """The table's lines of one model: pruned, unpruned, and what the selection adds."""
    best = {select: min(many, key=lambda build: build.cpu) for select, many in builds.items()}
    quickest = {select: min(build.seconds for build in many) for select, many in builds.items()}
    lines = []
    for select, build in best.items():
        sizes = f"{build.graph / 1e6:,.1f} | {build.engine / 1e6:,.1f} | {build.layers}"
        times = f"{quickest[select]:.1f} | {build.cpu:.1f} | {build.added / 1e9:.2f}"
        lines.append(f"| {model} {precision} | {select} | {sizes} | {times} |")
    pruned, plain = (best[select] for select in SELECTIONS)
    share = pruned.engine / plain.engine - 1
    lines.append(
        f"| {model} {precision} | the selection adds | {(pruned.graph - plain.graph) / 1e6:+,.1f} | "
        f"{(pruned.engine - plain.engine) / 1e6:+,.1f} (**{share:+.1%}**) | {pruned.layers - plain.layers:+} | "
        f"**{quickest['leverage'] - quickest['none']:+.1f}** | **{pruned.cpu - plain.cpu:+.1f}** | "
        f"{(pruned.added - plain.added) / 1e9:+.2f} |"
    )
    return lines


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=MODELS, type=click.Choice(MODELS))
@click.option("--precision", "precisions", multiple=True, default=["fp16"], type=click.Choice(["fp16", "fp32"]))
@click.option("--target", default="rtx-40", show_default=True, help="A target that TensorRT-RTX builds for.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(min=1), help="Builds of each graph.")
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose table is replaced.")
def main(
    models: tuple[str, ...], precisions: tuple[str, ...], target: str, repeat: int, write: Path | None
) -> None:
    sm = find_target(target).sm
    assert sm is not None
    lines = [
        f"{find_tensorrt('tensorrt_rtx').title} on a CPU, for {target} (sm {sm}); {repeat} builds of each graph.",
        "",
        "| vision graph | selection | graph, MB | engine, MB | layers | build, s | CPU, s | memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for precision in precisions:
            with tempfile.TemporaryDirectory() as place:
                graphs = {}
                for select in SELECTIONS:
                    folder = Path(place) / select
                    folder.mkdir()
                    graphs[select] = vision_graph(model, select, precision, folder)
                builds: dict[str, list[Build]] = {select: [] for select in SELECTIONS}
                for _ in range(repeat):
                    for select, graph in graphs.items():
                        builds[select].append(measure(graph, sm))
                lines += rows(model, precision, builds)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, "engine-cost", text)


if __name__ == "__main__":
    main()
