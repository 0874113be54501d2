"""Time of the unpruned vision graph, beside what else runs the same encoder on a CPU: torch with SDPA, and OpenVINO.

    python -m tools.bench_encoder --model vit-l --model mini-llava --write docs/performance.md

`vit-l` is CLIP ViT-L/14-336 with LLaVA-1.5-7B's projector and random weights (the arithmetic does not depend on them),
`mini-llava` the shipped model's shapes. Ours is the graph that `svdprune export --select none` writes, from bytes to
features. Every candidate has a process of its own and they take turns, a picture a call; medians.

`as it is` is the whole tower, as transformers runs it for LLaVA; `cut` ends at the layer that the features are read
from, as our graph does, and is the fair neighbour. OpenVINO gets the cut module from torch, as its own exporter does,
and, once more, our ONNX file. `pip install openvino` into the environment of `--peers` for its rows.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress

from tools.tables import write_between
from tools.turns import CLOCKS, ROOT, Figures, Turn, in_turn, serve

Call = Callable[[], Figures | None]
MODELS = ("vit-l", "mini-llava")
OUR_FILE = "ours/vision.onnx"


def shapes(model: str) -> tuple[dict[str, Any], int, int]:
    """Vision config, width of the language model, layers up to the tap."""
    from svdprune.exporter.checkpoint import Checkpoint
    from svdprune.exporter.families.llava import tap_of, vision_of
    from svdprune.exporter.source import shipped_folder
    from svdprune.exporter.towers.layers import depth_of
    from tools.memory import TEXT, VISION

    vision, hidden, tap = dict(VISION), int(str(TEXT["hidden_size"])), -2
    if model == "mini-llava":
        checkpoint = Checkpoint(shipped_folder())
        vision, tap = vision_of(checkpoint), tap_of(checkpoint.config)
        hidden = checkpoint.config["text_config"]["hidden_size"]
    return vision, hidden, depth_of(tap, vision["num_hidden_layers"])


def their_module(model: str, cut: bool) -> Any:
    """transformers' tower with SDPA and the same projector, whole or without the layers after the tap."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from svdprune.exporter.towers.layers import Projector

    vision, hidden, depth = shapes(model)
    given = {name: value for name, value in vision.items() if name != "model_type"}
    config = CLIPVisionConfig(**given, attn_implementation="sdpa")

    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = CLIPVisionModel(config)
            if cut:
                inner = getattr(self.tower, "vision_model", self.tower)
                inner.encoder.layers = inner.encoder.layers[:depth]
                inner.post_layernorm = torch.nn.Identity()
            self.projector = Projector(vision["hidden_size"], hidden, "gelu", True)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if cut:
                tokens = self.tower(pixels).last_hidden_state
            else:
                tokens = self.tower(pixels, output_hidden_states=True).hidden_states[depth]
            projected: torch.Tensor = self.projector(tokens[:, 1:])
            return projected

    torch.manual_seed(0)
    return Theirs().eval().requires_grad_(False)


def pixels_of(model: str, raw: bool = False) -> np.ndarray:
    """A picture, float32 (1, 3, side, side), or `raw`, uint8 (1, side, side, 3)."""
    side, random = shapes(model)[0]["image_size"], np.random.default_rng(0)
    if raw:
        return random.integers(0, 256, (1, side, side, 3), np.uint8)
    return random.standard_normal((1, 3, side, side)).astype(np.float32)


def prepare(model: str, folder: Path, openvino: bool) -> None:
    """Write our graph, or OpenVINO's of the cut module, into the folder."""
    import torch

    if not openvino:
        from tools.engine_cost import vision_graph

        (folder / "ours").mkdir()
        vision_graph(model, "none", "fp32", folder / "ours")
        return
    import openvino as ov

    module, pixels = their_module(model, cut=True), torch.from_numpy(pixels_of(model))
    ov.save_model(ov.convert_model(module, example_input=pixels), folder / "theirs.xml", compress_to_fp16=False)


def ours_call(model: str, folder: Path, threads: int) -> Call:
    """Our graph in ONNX Runtime, opened as the runtime opens it."""
    from svdprune.runtime.ort import open_session

    session, pixels = open_session(folder / OUR_FILE, threads), pixels_of(model, raw=True)
    return lambda: session.run(None, {"pixels": pixels}) and None


def torch_call(cut: bool) -> Callable[[str, Path, int], Call]:
    """transformers' tower in torch."""

    def make(model: str, folder: Path, threads: int) -> Call:
        import torch

        torch.set_num_threads(threads)
        module, pixels = their_module(model, cut), torch.from_numpy(pixels_of(model))

        def call() -> None:
            with torch.inference_mode():
                module(pixels)

        return call

    return make


def openvino_call(file: str) -> Callable[[str, Path, int], Call]:
    """A graph in OpenVINO, in float32."""

    def make(model: str, folder: Path, threads: int) -> Call:
        import openvino as ov

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = ov.Core().compile_model(folder / file, "CPU", settings)
        pixels = pixels_of(model, raw=file == OUR_FILE)
        request = compiled.create_infer_request()
        return lambda: request.infer([pixels]) and None

    return make


CANDIDATES: dict[str, tuple[Callable[[str, Path, int], Call], bool]] = {
    "ours, ONNX Runtime": (ours_call, False),
    "transformers, torch SDPA, as it is": (torch_call(cut=False), False),
    "transformers, torch SDPA, cut": (torch_call(cut=True), False),
    "transformers in OpenVINO, cut": (openvino_call("theirs.xml"), True),
    "our graph in OpenVINO": (openvino_call(OUR_FILE), True),
}
OURS = next(iter(CANDIDATES))


def has_openvino(python: str) -> bool:
    """Whether an interpreter can import OpenVINO."""
    return subprocess.run([python, "-c", "import openvino"], capture_output=True).returncode == 0


@click.command(help=__doc__)
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, default=MODELS, show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True)
@click.option("--peers", default=sys.executable, help="Python of the environment that has OpenVINO.  [default: this]")
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose `encoder` table is replaced.")
@click.option("--worker", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(
    models: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int,
    clock: str,
    peers: str,
    write: Path | None,
    worker: str | None,
    folder: Path | None,
) -> None:
    if worker is not None:
        assert folder is not None
        if worker in ("prepare", "prepare openvino"):
            prepare(models[0], folder, worker != "prepare")
        else:
            serve(CANDIDATES[worker][0](models[0], folder, threads[0]))
        return
    able = has_openvino(peers)
    if not able:
        click.echo(f"{peers} has no OpenVINO: its rows are left out", err=True)
    lines = [
        f"{platform.machine()} CPU, float32, one picture; medians of {rounds} calls in turn"
        f"{', milliseconds of the processor (other programs ran, too)' if clock == 'processor' else ''}.",
        "",
        "| model | threads | candidate | time, ms | beside ours |",
        "|---|---|---|---|---|",
    ]
    with Progress(transient=True) as progress:
        task = progress.add_task("encoders", total=len(models) * len(threads))
        for model in models:
            with tempfile.TemporaryDirectory() as name:
                for what, python in [("prepare", sys.executable), *([("prepare openvino", peers)] if able else [])]:
                    _run(python, model, what, name)
                for count in threads:
                    lines += rows(model, count, rounds, clock, name, peers, able)
                    progress.advance(task)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, "encoder", text)


def _run(python: str, model: str, worker: str, folder: str) -> None:
    command = [python, "-m", "tools.bench_encoder", "--worker", worker, "--model", model, "--folder", folder]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def rows(model: str, threads: int, rounds: int, clock: str, folder: str, peers: str, openvino: bool) -> list[str]:
    """The table's lines of one model with one number of threads."""
    turns = []
    for name, (_, foreign) in CANDIDATES.items():
        if foreign and not openvino:
            continue
        arguments = ["tools.bench_encoder", "--worker", name, "--model", model, "--folder", folder]
        arguments += ["--threads", str(threads)]
        turns.append(Turn.start(name, arguments, threads, peers if foreign else sys.executable))
    failed = in_turn(turns, rounds)
    if OURS in failed:
        raise click.ClickException(f"our own graph failed: {failed[OURS]}")
    figure = "seconds" if clock == "wall" else clock
    ours = turns[0].median(figure)
    lines = []
    for turn in turns:
        if turn.name in failed:
            lines.append(f"| {model} | {threads} | {turn.name} | failed: {failed[turn.name]} | |")
        else:
            seconds = turn.median(figure)
            lines.append(f"| {model} | {threads} | {turn.name} | {1e3 * seconds:,.0f} | {seconds / ours:.2f} |")
    return lines


if __name__ == "__main__":
    main()
