"""A quantised graph with some of its blocks in float again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx

from svdprune.calib.quantise.sites import Site


def restore_float(whole: Any, plain: Any, sites: Sequence[Site], blocks: Collection[str]) -> Any:
    """The graph `whole` with the sites of `blocks` reading their activation and weight as they do in `plain`.

    Args:
        whole: ``onnx.ModelProto`` in which all of `sites` are quantised. plain: the float graph it was made from. In
            both the large tensors may be references to files in one folder: they are copied as references.

    Returns:
        A new model; Q, DQ and tensors that nothing reads any more are gone.
    """
    model = onnx.ModelProto()
    model.CopyFrom(whole)
    graph = model.graph
    inputs = {site.node: (site.activation, site.weight) for site in sites if site.block in blocks}
    for node in graph.node:
        if node.name in inputs:
            node.input[0], node.input[1] = inputs[node.name]
    _drop_unread(graph)
    read = {name for node in graph.node for name in node.input}
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in plain.graph.initializer if t.name in read and t.name not in present)
    return model


def _drop_unread(graph: Any) -> None:
    """Remove nodes whose outputs nothing reads, then tensors and types of values that are gone."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(nodes)
    for field in (graph.initializer, graph.value_info):
        items = [item for item in field if item.name in needed]
        if len(items) < len(field):
            copies = [type(item).FromString(item.SerializeToString()) for item in items]
            del field[:]
            field.extend(copies)
