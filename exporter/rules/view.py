"""An ONNX model as the rules look at it: every node in its place, with the types, shapes and constants it can see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper, shape_inference

Shape = tuple[int | None, ...]


@dataclass
class Scope:
    """A graph, a loop's or branch's body, or a function, and the scopes around it.

    ``types`` are ONNX element types, ``shapes`` have None for dimensions that are not fixed.
    """

    opset: int
    folder: Path
    where: str = ""
    outer: Scope | None = None
    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    initializers: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)

    def around(self) -> Iterator[Scope]:
        """This scope, then those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def type(self, name: str) -> int | None:
        """Element type of a value; None where inference does not know it."""
        return next((s.types[name] for s in self.around() if name in s.types), None)

    def shape(self, name: str) -> Shape | None:
        """Shape of a value; None where not even its rank is known."""
        return next((s.shapes[name] for s in self.around() if name in s.shapes), None)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initialiser or of a Constant node; None for anything else."""
        for scope in self.around():
            if name in scope.initializers:
                return _array(scope.initializers[name], self.folder)
            if name in scope.makers:
                node = scope.makers[name]
                return _constant_of(node, self.folder) if node.op_type == "Constant" else None
        return None

    def is_fixed(self, name: str) -> bool:
        """Whether a value follows from constants and fixed shapes alone."""
        for scope in self.around():
            if name in scope.initializers:
                return True
            if name in scope.makers:
                node = scope.makers[name]
                if node.op_type in ("Shape", "Size"):
                    shape = self.shape(node.input[0])
                    return shape is not None and None not in shape
                return all(scope.is_fixed(i) for i in node.input if i) and not any(
                    a.HasField("g") for a in node.attribute
                )
        return False


@dataclass(frozen=True)
class Site:
    """A node in its scope."""

    node: Any
    scope: Scope

    @property
    def op(self) -> str:
        """Operator's name."""
        return str(self.node.op_type)

    @property
    def label(self) -> str:
        """The node as a person finds it: by its name, or by what it makes."""
        name = (
            f"node '{self.node.name}'"
            if self.node.name
            else f"the node that makes '{next(iter(self.node.output), '')}'"
        )
        return f"{name} ({self.op}){self.scope.where}"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs; "" for one left out."""
        return list(self.node.input)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that are there."""
        return [name for name in self.node.output if name]

    def has(self, position: int) -> bool:
        """Whether that input is given."""
        return position < len(self.node.input) and bool(self.node.input[position])

    def type(self, position: int) -> int | None:
        """Element type of an input."""
        return self.scope.type(self.node.input[position]) if self.has(position) else None

    def shape(self, position: int) -> Shape | None:
        """Shape of an input."""
        return self.scope.shape(self.node.input[position]) if self.has(position) else None

    def constant(self, position: int) -> np.ndarray | None:
        """Value of an input that is a constant."""
        return self.scope.constant(self.node.input[position]) if self.has(position) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value; strings as text."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default


@dataclass(frozen=True)
class View:
    """A whole model. ``sites`` are all its nodes, those of bodies and functions too; ``functions`` (domain, name)."""

    model: Any
    main: Scope
    sites: tuple[Site, ...]
    scopes: tuple[Scope, ...]
    functions: frozenset[tuple[str, str]]


def view_of(model: Any, folder: Path | None = None) -> View:
    """Look at a model (an onnx ``ModelProto``); ``folder`` is where its external data lie.

    Weights are read only where a rule asks for one, so a large model stays on the disk.
    """
    place = folder or Path(".")
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    main = Scope(opset, place)
    scopes: list[Scope] = []
    sites: list[Site] = []
    _enter(inferred.graph, main, scopes, sites)
    for function in inferred.functions:
        version = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), opset)
        scope = Scope(version, place, f" in function '{function.name}'")
        _walk(function.node, scope, scopes, sites)
        scopes.append(scope)
    known = frozenset((function.domain, function.name) for function in inferred.functions)
    return View(inferred, main, tuple(sites), tuple(scopes), known)


def _enter(graph: Any, scope: Scope, scopes: list[Scope], sites: list[Site]) -> None:
    """Read a graph's declarations into its scope, then its nodes."""
    for tensor in graph.initializer:
        scope.initializers[tensor.name] = tensor
        scope.types[tensor.name] = tensor.data_type
        scope.shapes[tensor.name] = tuple(tensor.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.type.WhichOneof("value") != "tensor_type":
            continue
        scope.types.setdefault(value.name, kind.elem_type)
        if kind.HasField("shape"):
            scope.shapes.setdefault(
                value.name, tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            )
    scopes.append(scope)
    _walk(graph.node, scope, scopes, sites)


def _walk(nodes: Any, scope: Scope, scopes: list[Scope], sites: list[Site]) -> None:
    for node in nodes:
        for name in node.output:
            scope.makers[name] = node
    for node in nodes:
        sites.append(Site(node, scope))
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for body in bodies:
                where = f" in {attribute.name} of '{node.name or node.op_type}'{scope.where}"
                _enter(body, Scope(scope.opset, scope.folder, where, scope), scopes, sites)


def _array(tensor: Any, folder: Path) -> np.ndarray:
    if external_data_helper.uses_external_data(tensor):
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)  # the model itself must not grow
        external_data_helper.load_external_data_for_tensor(copy, str(folder))
        tensor = copy
    array: np.ndarray = numpy_helper.to_array(tensor)
    return array


def _constant_of(node: Any, folder: Path) -> np.ndarray | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _array(attribute.t, folder)
        if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
            return np.asarray(onnx.helper.get_attribute_value(attribute))
    return None
