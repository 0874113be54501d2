"""Growing against shared key-value cache on one decoder graph: the same logits, and the time of prefill and of a step.

    python -m tools.kv_cache --layers 12 --hidden 768 --precision int4

The model is a random Llama, exported here. A growing cache is copied whole at every step, so its cost rises with the
rows in it; a shared one is written in place. Medians over the steps, one thread.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder import export_decoder
from svdprune.runtime.decoder.kv_cache import GrowingCache, SharedCache
from svdprune.runtime.decoder.onnxruntime import OnnxDecoder, OnnxState
from svdprune.runtime.ort import open_session

VOCAB, CONTEXT, HEAD_DIM = 4000, 2048, 64


def make_checkpoint(folder: Path, layers: int, hidden: int) -> None:
    """A random LLaVA whose language model has the given size."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        max_position_embeddings=CONTEXT,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).save_pretrained(folder)


def states(decoder: OnnxDecoder) -> dict[str, OnnxState]:
    """One fresh state with each kind of cache."""
    info = decoder.info
    shape, tensors = (info.kv_heads, info.head_dim), 2 * info.layers
    return {
        "growing": OnnxState(decoder, GrowingCache(tensors, shape, decoder.cache_dtype)),
        "shared": OnnxState(decoder, SharedCache(tensors, shape, decoder.cache_dtype, info.context)),
    }


def measure(state: OnnxState, rows: np.ndarray, prompt: int) -> tuple[float, float, list[np.ndarray]]:
    """Seconds of the prefill of ``prompt`` rows and of one step (median), and the logits of every step."""
    logits, seconds = [], []
    cuts = [0, *range(prompt, len(rows) + 1)]
    for start, stop in itertools.pairwise(cuts):
        began = time.perf_counter()
        logits.append(state.append(rows[start:stop], np.arange(start, stop)))
        seconds.append(time.perf_counter() - began)
    return seconds[0], float(np.median(seconds[1:])), logits


@click.command(help=__doc__)
@click.option("--layers", default=12, show_default=True)
@click.option("--hidden", default=768, show_default=True, help=f"A multiple of {HEAD_DIM}.")
@click.option("--precision", type=click.Choice(["fp32", "int4"]), default="int4", show_default=True)
@click.option("--steps", default=30, show_default=True, help="Tokens generated after each prompt.")
def main(layers: int, hidden: int, precision: Any, steps: int) -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, layers, hidden)
        checkpoint = Checkpoint(folder)
        info = export_decoder(checkpoint, checkpoint.config["text_config"], folder / "decoder", precision)
        decoder = OnnxDecoder(open_session(folder / info.file, threads=1), folder / info.file, info)
        click.echo("| prompt rows | cache | prefill, s | step, ms | largest logit difference |\n|---|---|---|---|---|")
        for prompt in (60, 600, 1800):
            rows = random.normal(size=(prompt + steps, hidden)).astype(np.float32) * 0.02
            found = {kind: measure(state, rows, prompt) for kind, state in states(decoder).items()}
            apart = max(
                np.abs(one - other).max() for one, other in zip(found["growing"][2], found["shared"][2], strict=True)
            )
            for kind, (prefill, step, _) in found.items():
                click.echo(f"| {prompt} | {kind} | {prefill:.2f} | {1e3 * step:.1f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
