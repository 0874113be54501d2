"""The language half of a checkpoint as files: the decoder graph, its weights and the embedding table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import DecoderConfig, decoder_config
from svdprune.exporter.decoder.graph import EMBEDDING, HEAD, ROOT, build_graph
from svdprune.exporter.decoder.operators import PRECISIONS, Operators
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderInfo, Mask

MODEL, DATA, TABLE = "model.onnx", "model.onnx.data", "embed_tokens.npy"


def export_decoder(
    checkpoint: Checkpoint,
    text_config: dict[str, Any],
    out_dir: str | Path,
    precision: str = "fp32",
    deepstack: int = 0,
    mask: Mask = "causal",
) -> DecoderInfo:
    """Write `model.onnx`, `model.onnx.data` and `embed_tokens.npy` of the language model into `out_dir`.

    One weight at a time is in memory. `model.onnx` is written last: where it is, the rest is whole.

    Args:
        checkpoint: its tensors under `model.language_model.` and `lm_head.weight` are read, no others.
        text_config: the language model's part of `config.json`; what it leaves out has transformers' defaults.
        precision: `fp32`, or `int4`: weights in blocks of 32 with a float32 scale each, the output projection in 8
            bits, all computed with float32 results.
        deepstack: levels of features that the vision part gives the decoder's first layers; an input of the graph.
        mask: which rows of a prompt see later ones; other than `causal`, an input of the graph gives the groups.

    Returns:
        The manifest's entry; `file` and `embedding` are relative to the parent of `out_dir`. `eos` comes from
        `generation_config.json` where there is one, else from `text_config`.

    Raises:
        UserError: an architecture, option or weight that the graph cannot express, or weights that do not fit the
            configuration.
        OSError: the files cannot be written (a full disk).
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown decoder precision {precision!r}: choose {' or '.join(PRECISIONS)}")
    config = decoder_config(text_config, deepstack, mask)
    head = output_projection(checkpoint, config)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with WeightFile(out / DATA) as store:
        ops = Operators(config, checkpoint, store, precision)
        model = build_graph(config, ops, head)
    refuse_leftovers(checkpoint, ops.used)
    _write_embedding(checkpoint, config, out / TABLE)
    ir.save(model, out / MODEL)
    return DecoderInfo(
        file=f"{out.name}/{MODEL}",
        embedding=f"{out.name}/{TABLE}",
        precision=precision,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden,
        vocab=config.vocab,
        context=config.context,
        eos=_eos(checkpoint, config),
        kv_cache="shared",
        position_axes=config.position_axes,
        deepstack=config.deepstack,
        mask=config.mask,
        embed_scale=config.embed_scale,
    )


def output_projection(checkpoint: Checkpoint, config: DecoderConfig) -> str:
    """The output projection's name, without ".weight": its own, or the embedding's where the two are tied."""
    if f"{HEAD}.weight" in checkpoint:
        return HEAD
    if config.tied or checkpoint.config.get("tie_word_embeddings"):
        return EMBEDDING.removesuffix(".weight")
    return HEAD  # reading it says that it is missing


def refuse_leftovers(checkpoint: Checkpoint, used: set[str]) -> None:
    """A weight that the graph has no place for means that the graph is not this model."""
    for name in checkpoint.names():
        # rotary_emb.inv_freq: a buffer that old versions of transformers saved and that the configuration determines
        ours = name.startswith(f"{ROOT}.") and not name.endswith("rotary_emb.inv_freq")
        if ours and name not in used and name != EMBEDDING:
            raise UserError(
                f"the checkpoint has a weight {name} that its config.json does not explain: it cannot be exported"
            )


def _write_embedding(checkpoint: Checkpoint, config: DecoderConfig, path: Path) -> None:
    """The token embeddings (V, H) for memory mapping: float16 for a half-precision checkpoint, else float32.

    float16 holds a float16 table exactly and a bfloat16 one to 3e-8 (2^-25), bfloat16 having fewer digits; one with
    values beyond float16's range is written as float32. A model's scale is not in it, as float16 would not hold the
    products: the runtime multiplies the rows that it reads.
    """
    info = checkpoint.info(EMBEDDING)
    if info.shape != (config.vocab, config.hidden):
        raise UserError(
            f"{EMBEDDING} has shape {info.shape} where config.json makes it {(config.vocab, config.hidden)}"
        )
    table = checkpoint.tensor(EMBEDDING)
    half = table.dtype in (torch.float16, torch.bfloat16) and float(table.abs().max()) <= torch.finfo(torch.float16).max
    np.save(path, table.to(torch.float16 if half else torch.float32).numpy())


def _eos(checkpoint: Checkpoint, config: DecoderConfig) -> list[int]:
    found = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if found is None:
        return list(config.eos)
    return [found] if isinstance(found, int) else list(found)
