"""The decoder: embeddings and a key-value cache in, logits of the last row and the longer cache out.

inputs   inputs_embeds float32 (B, N, H); attention_mask int64 (B, P + N), all ones: only the length of its
         rows is read, a batch has rows of one length; position_ids int64 (B, N), with M-RoPE (3, B, N), each below
         the context, gaps allowed; with DeepStack deepstack float32 (L, B, N, H), level l added after layer l, zeros
         where a row has none; for masks other than causal groups int64 (B, N): rows of one group >= 0 of a run see
         each other both ways, -1 sees earlier rows only; past_key_values.{i}.key and .value float32 (B, kv_heads, P,
         head_dim)
outputs  logits float32 (B, 1, V) of row N - 1; present.{i}.key and .value float32 (B, kv_heads, P + N, head_dim)

Past and present may also be one and the same buffer (B, kv_heads, capacity, head_dim) with capacity >= P + N: the new
rows are then written in place after the P that attention_mask leaves room for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.operators import OPSETS, Operators

ROOT = "model.language_model"
EMBEDDING = f"{ROOT}.embed_tokens.weight"
HEAD = "lm_head"
_IR_VERSION = 9  # of opset 18; a newer one would shut out older runtimes for nothing


def build_graph(config: DecoderConfig, ops: Operators, head: str) -> ir.Model:
    """Author the model. head: canonical name (without ".weight") of the output projection."""
    embeds = graph_input("inputs_embeds", ir.DataType.FLOAT, ("batch", "new", config.hidden))
    mask = graph_input("attention_mask", ir.DataType.INT64, ("batch", "total"))
    positions = positions_input(config, "batch")
    more = more_inputs(config, "batch")
    past = [
        graph_input(
            f"past_key_values.{i}.{part}", ir.DataType.FLOAT, ("batch", config.kv_heads, "past", config.head_dim)
        )
        for i in range(config.layers)
        for part in ("key", "value")
    ]
    ops.begin(mask, positions, more.get("groups"))
    logits, present = build_layers(config, ops, embeds, past, more.get("deepstack"), head)
    if config.logit_softcap is not None:
        logits = ops.softcap(logits, config.logit_softcap, "logits")
    graph_output(logits, "logits", ir.DataType.FLOAT, ("batch", 1, config.vocab))
    for after in present:
        graph_output(after, after.name, ir.DataType.FLOAT, ("batch", config.kv_heads, "present", config.head_dim))
    graph = ir.Graph(
        [embeds, mask, positions, *more.values(), *past],
        [logits, *present],
        nodes=ops.tape.nodes,
        initializers=ops.tape.initializers,
        opset_imports=OPSETS,
        name="decoder",
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="svdprune")


def build_layers(
    config: DecoderConfig,
    ops: DecoderOperators,
    x: ir.Value,
    past: list[ir.Value],
    deepstack: ir.Value | None,
    head: str,
) -> tuple[ir.Value, list[ir.Value]]:
    """Everything between the inputs and the outputs, whatever the spelling.

    Args:
        x: embeddings (B, N, H) as the residual stream has them.
        past: keys and values of the layers in turn.
        deepstack: (L, B, N, H), level l added after layer l.
        head: canonical name (without ".weight") of the output projection.

    Returns:
        Logits (B, 1, V) of the last row, and the present keys and values in turn, `present.{i}.key` and `.value`.
    """
    normed = ops.rms_norm(x, f"{ROOT}.layers.0.input_layernorm.weight", config.hidden, "layers.0/input_norm")
    present: list[ir.Value] = []
    for i in range(config.layers):
        layer, short, last = f"{ROOT}.layers.{i}", f"layers.{i}", i == config.layers - 1
        attended, keys, values = _attention(config, ops, i, normed, (past[2 * i], past[2 * i + 1]))
        present += [keys, values]
        level = None if deepstack is None or i >= config.deepstack else _level(ops, deepstack, i)
        if last:  # only the last row's logits are wanted, and nothing below mixes rows
            attended, x = ops.last_row(attended, f"{short}/last"), ops.last_row(x, f"{short}/last_residual")
            level = None if level is None else ops.last_row(level, f"{short}/last_level")
        out = ops.linear(
            attended, f"{layer}.self_attn.o_proj", config.hidden, config.heads * config.head_dim, config.output_bias
        )
        before_mlp = "post_attention_layernorm"
        if config.sandwich:
            out = ops.after_norm(out, f"{layer}.post_attention_layernorm.weight", f"{short}/attention_after_norm")
            before_mlp = "pre_feedforward_layernorm"
        normed, x = ops.add_norm(out, x, f"{layer}.{before_mlp}.weight", f"{short}/mlp_norm")
        out = _mlp(config, ops, i, normed)
        if config.sandwich:
            out = ops.after_norm(out, f"{layer}.post_feedforward_layernorm.weight", f"{short}/mlp_after_norm")
        if level is not None:
            x = ops.op("Add", [x, level], f"{short}/deepstack")
        following = f"{ROOT}.norm.weight" if last else f"{ROOT}.layers.{i + 1}.input_layernorm.weight"
        after = "norm" if last else f"layers.{i + 1}/input_norm"
        normed, x = ops.add_norm(out, x, following, after)
    return ops.linear(normed, head, config.vocab, config.hidden, bias=False, bits=8), present


def _attention(
    config: DecoderConfig, ops: DecoderOperators, index: int, x: ir.Value, past: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    name, short = f"{ROOT}.layers.{index}.self_attn", f"layers.{index}"
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    query = ops.linear(x, f"{name}.q_proj", wide, config.hidden, config.qkv_bias)  # (B, N, heads * head_dim)
    key = ops.linear(x, f"{name}.k_proj", narrow, config.hidden, config.qkv_bias)  # (B, N, kv_heads * head_dim)
    value = ops.linear(x, f"{name}.v_proj", narrow, config.hidden, config.qkv_bias)
    query = ops.split_heads(query, config.heads, f"{short}/query_heads")
    key = ops.split_heads(key, config.kv_heads, f"{short}/key_heads")
    value = ops.split_heads(value, config.kv_heads, f"{short}/value_heads")
    if config.qk_norm:
        query = ops.heads_norm(query, f"{name}.q_norm.weight", config.heads, f"{short}/q_norm")
        key = ops.heads_norm(key, f"{name}.k_norm.weight", config.kv_heads, f"{short}/k_norm")
    query = ops.rotate(index, query, f"{short}/query")
    key = ops.rotate(index, key, f"{short}/key")
    return ops.attend(index, query, key, value, past, f"{short}/attention")


def _mlp(config: DecoderConfig, ops: DecoderOperators, index: int, x: ir.Value) -> ir.Value:
    name, short = f"{ROOT}.layers.{index}.mlp", f"layers.{index}"
    gate = ops.linear(x, f"{name}.gate_proj", config.intermediate, config.hidden, config.mlp_bias)
    up = ops.linear(x, f"{name}.up_proj", config.intermediate, config.hidden, config.mlp_bias)
    inner = ops.op("Mul", [ops.activate(gate, f"{short}/activated"), up], f"{short}/gated")
    return ops.linear(inner, f"{name}.down_proj", config.hidden, config.intermediate, config.mlp_bias)


def _level(ops: DecoderOperators, deepstack: ir.Value, index: int) -> ir.Value:
    """(L, B, N, H) -> (B, N, H)."""
    place = ops.constant(f"level_{index}", np.array(index, np.int64))
    return ops.op("Gather", [deepstack, place], f"deepstack.{index}", axis=0)


def positions_input(config: DecoderConfig, batch: int | str) -> ir.Value:
    """position_ids, of one or three axes."""
    axes = () if config.position_axes == 1 else (config.position_axes,)
    return graph_input("position_ids", ir.DataType.INT64, (*axes, batch, "new"))


def more_inputs(config: DecoderConfig, batch: int | str) -> dict[str, ir.Value]:
    """The inputs that only some models have, by name."""
    found: dict[str, ir.Value] = {}
    if config.deepstack:
        shape = (config.deepstack, batch, "new", config.hidden)
        found["deepstack"] = graph_input("deepstack", ir.DataType.FLOAT, shape)
    if config.mask != "causal":
        found["groups"] = graph_input("groups", ir.DataType.INT64, (batch, "new"))
    return found


def graph_input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    """An input of the graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def graph_output(result: ir.Value, name: str | None, dtype: ir.DataType, shape: tuple[int | str, ...]) -> None:
    """Make a value fit to be an output of the graph."""
    result.name, result.dtype, result.shape = name, dtype, ir.Shape(shape)
