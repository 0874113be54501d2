"""What share of the vision encoder's time the selection takes: ViT-L/14-336 shapes, ONNX Runtime on a CPU.

    python -m tools.selection_share --write docs/performance.md

The graph is the exported one, with random weights: the arithmetic does not depend on them. ONNX Runtime writes the time
of every node of the same runs; nodes are counted as selection by the names the exporter gives them. Medians.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from pathlib import Path

import click
import numpy as np

from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.ort_layers import ort_layers
from tools.engine_cost import KEEP, MODELS, vision_graph
from tools.tables import write_between


def pixels(model_input: Path) -> dict[str, np.ndarray]:
    """Random bytes of the shape that the graph asks for: uint8 (1, height, width, 3)."""
    import onnx

    given = onnx.load(str(model_input), load_external_data=False).graph.input[0]
    shape = [d.dim_value or 1 for d in given.type.tensor_type.shape.dim]
    return {given.name: np.random.default_rng(0).integers(0, 256, shape, np.uint8)}


def row(model: str, threads: int, table: LayerTable) -> str:
    """The table's line of one model."""
    seconds = {name: summary.median for name, summary in table.parts.items()}
    whole = sum(seconds.values())
    selection = seconds["selection"]
    encoder = seconds["encoder"]
    return (
        f"| {model} | {threads} | {1e3 * encoder:,.0f} | {1e3 * selection:,.1f} | "
        f"**{selection / encoder:.2%}** | {selection / whole:.2%} |"
    )


@click.command(help=__doc__)
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, default=MODELS, show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose `share` table is replaced.")
def main(models: tuple[str, ...], threads: tuple[int, ...], runs: int, write: Path | None) -> None:
    lines = [
        f"{platform.machine()} CPU, onnxruntime {importlib.metadata.version('onnxruntime')}, fp32, one picture, "
        f"leverage with K = {KEEP}; {runs} runs.",
        "",
        "| model | threads | encoder, ms | selection, ms | of the encoder | of the whole graph |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            folder = Path(name) / model
            folder.mkdir()
            graph = vision_graph(model, "leverage", "fp32", folder)
            feed = pixels(graph)
            for count in threads:
                lines.append(row(model, count, ort_layers(graph, feed, count, runs, warm_up=1)))
                click.echo(lines[-1], err=True)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, "share", text)


if __name__ == "__main__":
    main()
