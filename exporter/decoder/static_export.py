"""The language half of a checkpoint as the graph that engines are built from, and whether a target can build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import decoder_config
from svdprune.exporter.decoder.export import output_projection, refuse_leftovers
from svdprune.exporter.decoder.static_graph import build_static_graph
from svdprune.exporter.decoder.static_operators import STATIC_OPSET, STATIC_PRECISIONS, StaticOperators
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderEngineInfo, Mask

MODEL, DATA = "engine.onnx", "engine.onnx.data"


def export_engine_decoder(
    checkpoint: Checkpoint,
    text_config: dict[str, Any],
    out_dir: str | Path,
    cache: int,
    precision: str = "fp16",
    deepstack: int = 0,
    mask: Mask = "causal",
) -> DecoderEngineInfo:
    """Write `engine.onnx` and `engine.onnx.data` of the language model into `out_dir`.

    One weight at a time is in memory. `engine.onnx` is written last: where it is, the rest is whole. The embedding
    table is that of `export_decoder`, which is not written again.

    Args:
        checkpoint: its tensors under `model.language_model.` and `lm_head.weight` are read, no others.
        text_config: the language model's part of `config.json`; what it leaves out has transformers' defaults.
        cache: rows of the KV cache, prompt and answer together; at most the model's context.
        precision: `fp16`, or `fp32` for ONNX Runtime (no engine can be built from that one).
        deepstack, mask: as for `export_decoder`.

    Returns:
        The manifest's entry; `file` is relative to the parent of `out_dir`.

    Raises:
        UserError: an architecture, option, weight or cache length that the graph cannot express, a weight beyond
            float16, or weights that do not fit the configuration.
        OSError: the files cannot be written (a full disk).
    """
    if precision not in STATIC_PRECISIONS:
        raise UserError(
            f"unknown precision {precision!r} of the decoder engine: choose {' or '.join(STATIC_PRECISIONS)}"
        )
    config = decoder_config(text_config, deepstack, mask)
    if not 1 <= cache <= config.context:
        raise UserError(f"a cache of {cache} rows: it must have between 1 and {config.context}, the model's context")
    head = output_projection(checkpoint, config)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with WeightFile(out / DATA) as store:
        ops = StaticOperators(config, checkpoint, store, precision)
        model = build_static_graph(config, ops, head, cache, precision)
    refuse_leftovers(checkpoint, ops.used)
    ir.save(model, out / MODEL)
    return DecoderEngineInfo(file=f"{out.name}/{MODEL}", precision=precision, opset=STATIC_OPSET, cache=cache)
