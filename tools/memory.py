"""Memory that exporting the vision graph of a 7B-shaped LLaVA takes, beyond what the imports take.

    python -m tools.memory --precision fp32 --precision fp16

The checkpoint is made here: LLaVA-1.5-7B's shapes in float16, random vision weights, and language-model
shards that are holes in a file (13 GB that take no disk). Reading them would show in the peak, so the
figure also proves that they are not read.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from svdprune.exporter.towers.clip import ClipTower
from svdprune.exporter.towers.layers import Projector
from tools.tables import write_between

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32064,
}

# Run in a fresh interpreter, so that only the export is in its peak.
CHILD = """
import resource, sys, time
from pathlib import Path
import torch
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.vision import build_vision, save_graph
import torch.onnx._internal.exporter._core, transformers  # what the export imports on its way
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, began = peak(), time.time()
checkpoint = Checkpoint(sys.argv[1])
family = family_of(checkpoint.config, "7B-shaped")
spec = family.describe(checkpoint)
graph = build_vision(checkpoint, family, spec, SelectorConfig(name="leverage"), 32, precision=sys.argv[3])
save_graph(graph, Path(sys.argv[2]) / "vision.onnx")
size = sum(f.stat().st_size for f in Path(sys.argv[2]).iterdir())
print(f"{before:.2f} {peak():.2f} {time.time() - began:.0f} {size / 2**30:.2f}")
"""


def shard(file: Path, shapes: dict[str, tuple[int, ...]], fill: np.random.Generator | None) -> None:
    """A float16 safetensors file; without `fill` its data is a hole that takes no disk and reads as zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if fill is None:
            out.truncate(8 + len(text) + end)
        else:
            for shape in shapes.values():
                spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
                out.write((fill.standard_normal(math.prod(shape), np.float32) * spread).astype(np.float16).tobytes())


def make_checkpoint(folder: Path) -> None:
    """LLaVA-1.5-7B's shapes: one real shard for the vision part, eight holes for the language model."""
    import torch

    with torch.device("meta"):
        tower, projector = (
            ClipTower(VISION, VISION["num_hidden_layers"]),
            Projector(1024, TEXT["hidden_size"], "gelu", True),
        )
    shapes = {f"vision_tower.vision_model.{n}": tuple(p.shape) for n, p in tower.state_dict().items()}
    shapes |= {f"multi_modal_projector.{n}": tuple(p.shape) for n, p in projector.state_dict().items()}
    names = {"model-00001-of-00009.safetensors": shapes}
    h, m = TEXT["hidden_size"], TEXT["intermediate_size"]
    for part in range(8):
        layers: dict[str, tuple[int, ...]] = {}
        for i in range(4 * part, 4 * part + 4):
            prefix = f"language_model.model.layers.{i}."
            layers |= {f"{prefix}self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
            layers |= {f"{prefix}mlp.{x}_proj.weight": (m, h) for x in ("gate", "up")} | {
                f"{prefix}mlp.down_proj.weight": (h, m)
            }
        names[f"model-{part + 2:05}-of-00009.safetensors"] = layers
    for file, content in names.items():
        shard(folder / file, content, np.random.default_rng(0) if content is shapes else None)
    index = {"weight_map": {tensor: file for file, content in names.items() for tensor in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llava", "vision_config": VISION, "text_config": TEXT, "image_token_index": 32000}
    (folder / "config.json").write_text(json.dumps(config))
    image = {"size": {"shortest_edge": 336}, "crop_size": 336, "do_center_crop": True}
    image |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))


@click.command(help=__doc__)
@click.option("--precision", "precisions", multiple=True, default=["fp32", "fp16"], type=click.Choice(["fp32", "fp16"]))
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose table is replaced.")
def main(precisions: tuple[str, ...], write: Path | None) -> None:
    lines = [
        "| encoder | imports alone, GiB | peak, GiB | beyond imports, GiB | graph, GiB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        folder.mkdir()
        make_checkpoint(folder)
        for precision in precisions:
            out = Path(place) / precision
            out.mkdir()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(folder), str(out), precision],
                check=True,
                capture_output=True,
                text=True,
            )
            before, peak, seconds, size = done.stdout.split()[-4:]
            lines.append(
                f"| {precision} | {before} | {peak} | **{float(peak) - float(before):.2f}** | {size} | {seconds} |"
            )
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, "memory", text)


if __name__ == "__main__":
    main()
