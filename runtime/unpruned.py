"""The same vision graph without the selection: what pruning is measured against.

Derived from a bundle's own graph by surgery on the protobuf, so that the comparison has the same weights, precision
and operators: the gather by ``kept_indices`` becomes its own input, the projector sees all T tokens, and what only
served the selection is left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from svdprune.runtime.errors import BundleError, SvdpruneError, UserError
from svdprune.runtime.lazy import require

GATHERS = {"Gather": 1, "GatherElements": 1, "GatherND": 1}  # operator -> which input is the indices; input 0 is data
FEATURE = "the unpruned graph"


def unpruned_graph(vision: Path, out: Path) -> Path:
    """Write the vision graph without its selection.

    The weights are not written again: external data stay the file they are, which is found beside ``out``. In another
    folder than the graph's, that file is hard-linked, or copied where the file system cannot link.

    Args:
        vision: a bundle's vision graph, with the outputs ``features`` [B, K, H], ``kept_indices`` [B, K] and ``scores``
            [B, T].
        out: where to write; its folder must exist.

    Returns:
        ``out``: the same inputs, the output ``features`` float32 [B, T, H], and ``deepstack`` [B, L, T, H] where the
        graph has levels.

    Raises:
        UserError: ``out`` is the graph itself.
        BundleError: the graph cannot be read, or its features do not come from one gather by ``kept_indices``.
        SvdpruneError: nothing can be written at ``out``.
        MissingDependency: onnx is not installed.
    """
    if out.resolve() == vision.resolve():
        raise UserError(f"{out} is the pruned graph itself: give another place for the unpruned one")
    model = unpruned_model(vision)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_bytes(model.SerializeToString())
        for name in _data_files(model):
            _share(vision.parent / name, out.parent / name)
        os.replace(partial, out)
    except OSError as error:
        raise SvdpruneError(f"{out} cannot be written ({error.strerror}): give a folder with room in it") from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def unpruned_model(vision: Path) -> Any:
    """The graph of ``unpruned_graph`` as an ``onnx.ModelProto``, its external data left where they are.

    Raises:
        BundleError, MissingDependency: as ``unpruned_graph``.
    """
    onnx = require("onnx", extra="profile", feature=FEATURE)
    message = require("google.protobuf.message", extra="profile", feature=FEATURE)
    try:
        model = onnx.load(str(vision), load_external_data=False)
    except (OSError, message.DecodeError) as error:
        raise BundleError(f"{vision} cannot be read ({error}): copy or export the bundle again") from error
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    if not {"features", "kept_indices", "scores"} <= set(outputs):
        raise BundleError(f"{vision} lacks the output features, kept_indices or scores: export the bundle again")
    tokens = outputs["scores"].type.tensor_type.shape.dim[1].dim_value
    if tokens < 1:
        raise BundleError(f"{vision} does not say how many tokens its scores are for: export the bundle again")
    # Everything computed with the indices, the features among it.
    after = touched = _after(graph.node, {"kept_indices"})
    for node in graph.node:
        which = GATHERS.get(node.op_type)
        if which is not None and node.input[which] in touched and node.input[0] not in touched:
            _replace_input(graph, node.output[0], node.input[0])
            # A later gather by what this one gave - the sources of the kept tokens - is no choice any more.
            touched = _after(graph.node, {"kept_indices"})
    wanted = {"features", "deepstack"} & set(outputs)
    needed = _before(graph.node, wanted)
    if needed & {"kept_indices"}:
        raise BundleError(f"{vision} makes its features with kept_indices in a way that cannot be taken out")
    _keep(graph.node, lambda node: bool(needed & set(node.output)))
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.value_info, lambda value: value.name in needed - after)  # those after the gather have K for T
    _keep(graph.output, lambda value: value.name in wanted)
    for value in graph.output:
        value.type.tensor_type.shape.dim[-2].dim_value = tokens
    _check_shapes(onnx, model, vision, tokens)
    return model


def _check_shapes(onnx: Any, model: Any, vision: Path, tokens: int) -> None:
    """A projector traced for K rows alone (a reshape to K, say) does not take T: shape inference tells."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        said = str(error).strip().splitlines()[-1]
        raise BundleError(f"{vision}: what follows the selection does not take all {tokens} tokens ({said})") from error


def _after(nodes: Iterable[Any], values: set[str]) -> set[str]:
    """``values`` and every value computed from them."""
    found = set(values)
    for node in nodes:  # in topological order, as ONNX demands
        if found & set(node.input):
            found |= set(node.output)
    return found


def _before(nodes: Any, values: set[str]) -> set[str]:
    """``values`` and every value they are computed from."""
    found = set(values)
    for node in reversed(nodes):
        if found & set(node.output):
            found |= set(node.input)
    return found


def _replace_input(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def _keep(field: Any, wanted: Any) -> None:
    """Filter a repeated protobuf field in place."""
    kept = [item for item in field if wanted(item)]
    del field[:]
    field.extend(kept)


def _data_files(model: Any) -> list[str]:
    """Names of the external data files, relative to the graph."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def _share(data: Path, place: Path) -> None:
    """Let ``place`` be the file ``data``."""
    if place.exists() and place.samefile(data):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(data, place)
    except OSError:  # another file system, one without links, or not the caller's file
        shutil.copyfile(data, place)
