"""The decoder that engines are built from: a cache of fixed length, written in place.

inputs   inputs_embeds float32 (1, N, H); position_ids int64 (1, N), with M-RoPE (3, 1, N), each below the context,
         gaps allowed; with DeepStack deepstack float32 (L, 1, N, H); for masks other than causal groups int64 (1, N),
         both as in `graph.py`; write_index int64 (1,): rows already in the cache, write_index + N <= C;
         past.{i}.key and .value float16 (1, kv_heads, C, head_dim), C rows whatever they hold
outputs  logits float32 (1, 1, V) of row N - 1; present.{i}.key and .value, past with the rows from write_index to
         write_index + N - 1 written: bind one buffer as both

N is 1 for a step of decoding and up to C for a prompt. Row n sees the rows c <= write_index + n of the cache as far as
the layer's window reaches, and the new rows of its group, so rows behind are never read and the cache needs no
clearing; to go back to a shorter cache, give a smaller write_index. With the precision fp32 every float16 above is
float32: for ONNX Runtime, as TensorRT's attention takes float16 only.
"""

from __future__ import annotations

import onnx_ir as ir

from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.graph import build_layers, graph_input, graph_output, more_inputs, positions_input
from svdprune.exporter.decoder.static_operators import STATIC_OPSET, StaticOperators

_IR_VERSION = 12  # of opset 24


def build_static_graph(config: DecoderConfig, ops: StaticOperators, head: str, cache: int, precision: str) -> ir.Model:
    """Author the model. head: canonical name (without ".weight") of the output projection; cache: C."""
    kind = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}[precision]
    shape = (1, config.kv_heads, cache, config.head_dim)
    embeds = graph_input("inputs_embeds", ir.DataType.FLOAT, (1, "new", config.hidden))  # as vision features come
    positions, more = positions_input(config, 1), more_inputs(config, 1)
    write_index = graph_input("write_index", ir.DataType.INT64, (1,))
    past = [graph_input(f"past.{i}.{part}", kind, shape) for i in range(config.layers) for part in ("key", "value")]
    ops.begin(embeds, positions, write_index, more.get("groups"), cache)
    product, present = build_layers(config, ops, embeds, past, more.get("deepstack"), head)
    capped = config.logit_softcap is not None
    logits = ops.widen(product, "logits/wide" if capped else "logits")
    if config.logit_softcap is not None:
        logits = ops.softcap(logits, config.logit_softcap, "logits")
    graph_output(logits, "logits", ir.DataType.FLOAT, (1, 1, config.vocab))
    for after in present:
        graph_output(after, after.name, kind, shape)
    graph = ir.Graph(
        [embeds, positions, *more.values(), write_index, *past],
        [logits, *present],
        nodes=ops.tape.nodes,
        initializers=ops.tape.initializers,
        opset_imports={"": STATIC_OPSET},
        name="decoder",
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="svdprune")
