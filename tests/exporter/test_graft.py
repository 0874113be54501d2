"""Joining graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from svdprune.exporter.graft import graft


def affine(name_in: str, name_out: str, factor: float, opset: int = 18) -> ir.Model:
    """x -> factor * x + factor, with names that collide between two such graphs."""
    x = ir.Value(name=name_in, shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": opset}, name="affine")
    tape = ir.tape.Tape(graph)
    weight = tape.initializer(ir.tensor(np.float32(factor)), name="weight")
    out = tape.op("Add", [tape.op("Mul", [x, weight], name="node"), weight])
    out.name, out.shape, out.dtype = name_out, ir.Shape(["batch", 3]), ir.DataType.FLOAT
    graph.outputs.append(out)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {model.graph.inputs[0].name: x}))


def test_the_joined_graph_computes_one_after_the_other() -> None:
    main, part = affine("x", "y", 2.0), affine("x", "y", 3.0)
    (middle,) = main.graph.outputs
    outputs = graft(main, part, {"x": middle}, "part")
    main.graph.outputs.clear()
    main.graph.outputs.append(outputs["y"])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(run(main, x)[0], 3 * (2 * x + 2) + 3)
    assert len(set(main.graph.initializers)) == 2


def test_an_input_that_is_an_output_passes_through() -> None:
    main, part = affine("x", "y", 2.0), affine("x", "y", 3.0)
    part.graph.outputs.append(part.graph.inputs[0])
    (middle,) = main.graph.outputs
    assert graft(main, part, {"x": middle}, "part")["x"] is middle


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no value given for x"):
        graft(affine("x", "y", 2.0), affine("x", "y", 3.0), {}, "part")
    with pytest.raises(ValueError, match="opset 20"):
        graft(affine("x", "y", 2.0), affine("x", "y", 3.0, opset=20), {}, "part")
