"""A torch module as an ONNX graph whose nodes are named for the modules that they came from."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn

OPSET = 18


def traced(module: nn.Module, examples: Mapping[str, torch.Tensor], outputs: list[str]) -> ir.Model:
    """Trace a module whose inputs have the names of `examples`, which share their first axis, the batch."""
    batch = torch.export.Dim("batch", min=1)
    # What a module takes as `*extras` is one argument to torch.export, a tuple.
    first, *more = ({0: batch} for _ in examples)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(examples),
            output_names=outputs,
            dynamic_shapes=(first, tuple(more)) if more else (first,),
            verbose=False,
            external_data=True,
        )
    assert program is not None
    model: ir.Model = program.model
    modules = {name for name, _ in module.named_modules()}
    for node in model.graph:
        node.name = _named(node, modules)
        node.metadata_props.clear()  # source lines and stack traces of this machine have no place in a shipped graph
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    return model


def _named(node: ir.Node, modules: set[str]) -> str:
    """The node's own name after the path of the innermost module that it was traced in."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    path = next((scope for scope in reversed(scopes[:-1]) if scope in modules), "").removeprefix("encoder.")
    leaf = (node.name or node.op_type).removeprefix("node_")
    return f"{path}/{leaf}" if path else leaf


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter speaks at length of things its user cannot change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=DeprecationWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)
