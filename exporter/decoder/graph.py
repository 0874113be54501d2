"""The decoder: embeddings and a key-value cache in, logits of the last row and the longer cache out.

inputs   inputs_embeds float32 (B, N, H); attention_mask int64 (B, P + N), all ones: only the length of its
         rows is read, a batch has rows of one length; position_ids int64 (B, N), each below the context, gaps
         allowed; past_key_values.{i}.key and .value float32 (B, kv_heads, P, head_dim)
outputs  logits float32 (B, 1, V) of row N - 1; present.{i}.key and .value float32 (B, kv_heads, P + N, head_dim)

Past and present may also be one and the same buffer (B, kv_heads, capacity, head_dim) with capacity >= P + N: the new
rows are then written in place after the P that attention_mask leaves room for.
"""

from __future__ import annotations

import onnx_ir as ir

from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.operators import OPSETS, Operators

ROOT = "model.language_model"
EMBEDDING = f"{ROOT}.embed_tokens.weight"
HEAD = "lm_head"
_IR_VERSION = 9  # of opset 18; a newer one would shut out older runtimes for nothing


def build_graph(config: DecoderConfig, ops: Operators, head: str) -> ir.Model:
    """Author the model. head: canonical name (without ".weight") of the output projection."""
    embeds = _value("inputs_embeds", ir.DataType.FLOAT, ("batch", "new", config.hidden))
    mask = _value("attention_mask", ir.DataType.INT64, ("batch", "total"))
    positions = _value("position_ids", ir.DataType.INT64, ("batch", "new"))
    cache = [
        (_cache(config, f"past_key_values.{i}.key", "past"), _cache(config, f"past_key_values.{i}.value", "past"))
        for i in range(config.layers)
    ]
    lengths = ops.cache_lengths(mask)

    x = embeds  # (B, N, H) all along
    normed = ops.rms_norm(x, f"{ROOT}.layers.0.input_layernorm.weight", config.hidden, "layers.0/input_norm")
    present: list[ir.Value] = []
    for i in range(config.layers):
        layer, short, last = f"{ROOT}.layers.{i}", f"layers.{i}", i == config.layers - 1
        attended, keys, values = _attention(config, ops, i, normed, positions, cache[i], lengths)
        present += [keys, values]
        if last:  # only the last row's logits are wanted, and nothing below mixes rows
            attended, x = ops.last_row(attended, f"{short}/last"), ops.last_row(x, f"{short}/last_residual")
        out = ops.linear(
            attended, f"{layer}.self_attn.o_proj", config.hidden, config.heads * config.head_dim, config.output_bias
        )
        normed, x = ops.add_norm(out, x, f"{layer}.post_attention_layernorm.weight", f"{short}/mlp_norm")
        following = f"{ROOT}.norm.weight" if last else f"{ROOT}.layers.{i + 1}.input_layernorm.weight"
        after = "norm" if last else f"layers.{i + 1}/input_norm"
        normed, x = ops.add_norm(_mlp(config, ops, i, normed), x, following, after)

    logits = ops.linear(normed, head, config.vocab, config.hidden, bias=False, bits=8)  # (B, 1, V)
    _declare(logits, "logits", ("batch", 1, config.vocab))
    for i, value in enumerate(present):
        part = "key" if i % 2 == 0 else "value"
        _declare(value, f"present.{i // 2}.{part}", ("batch", config.kv_heads, "present", config.head_dim))
    inputs = [embeds, mask, positions, *(value for pair in cache for value in pair)]
    graph = ir.Graph(
        inputs,
        [logits, *present],
        nodes=ops.tape.nodes,
        initializers=ops.tape.initializers,
        opset_imports=OPSETS,
        name="decoder",
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="svdprune")


def _attention(
    config: DecoderConfig,
    ops: Operators,
    index: int,
    x: ir.Value,
    positions: ir.Value,
    past: tuple[ir.Value, ir.Value],
    lengths: tuple[ir.Value, ir.Value],
) -> tuple[ir.Value, ir.Value, ir.Value]:
    name, short = f"{ROOT}.layers.{index}.self_attn", f"layers.{index}"
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    query = ops.linear(x, f"{name}.q_proj", wide, config.hidden, config.qkv_bias)  # (B, N, heads * head_dim)
    key = ops.linear(x, f"{name}.k_proj", narrow, config.hidden, config.qkv_bias)  # (B, N, kv_heads * head_dim)
    value = ops.linear(x, f"{name}.v_proj", narrow, config.hidden, config.qkv_bias)
    if config.qk_norm:
        query = ops.heads_norm(query, f"{name}.q_norm.weight", config.heads, f"{short}/q_norm")
        key = ops.heads_norm(key, f"{name}.k_norm.weight", config.kv_heads, f"{short}/k_norm")
    query = ops.rotate(query, positions, f"{short}/query")
    key = ops.rotate(key, positions, f"{short}/key")
    present = (f"present.{index}.key", f"present.{index}.value")
    return ops.attend(query, key, value, past, lengths, present, f"{short}/attention")


def _mlp(config: DecoderConfig, ops: Operators, index: int, x: ir.Value) -> ir.Value:
    name, short = f"{ROOT}.layers.{index}.mlp", f"layers.{index}"
    gate = ops.linear(x, f"{name}.gate_proj", config.intermediate, config.hidden, config.mlp_bias)
    up = ops.linear(x, f"{name}.up_proj", config.intermediate, config.hidden, config.mlp_bias)
    sigmoid = ops.op("Sigmoid", [gate], f"{short}/sigmoid")
    silu = ops.op("Mul", [gate, sigmoid], f"{short}/silu")
    inner = ops.op("Mul", [silu, up], f"{short}/gated")
    return ops.linear(inner, f"{name}.down_proj", config.hidden, config.intermediate, config.mlp_bias)


def _cache(config: DecoderConfig, name: str, length: str) -> ir.Value:
    return _value(name, ir.DataType.FLOAT, ("batch", config.kv_heads, length, config.head_dim))


def _value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _declare(value: ir.Value, name: str, shape: tuple[int | str, ...]) -> None:
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
