"""A vision graph in small: two numbered layers of two products each, a product that only scores, a projector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from svdprune.runtime.tiling.feed import Prepared

TOKENS, WIDTH, KEEP = 6, 8, 2


def write_graph(path: Path, dtype: type = np.float32, weight: float = 1.0) -> Path:
    """Pixels float32 (B, 6, 8) -> features, kept_indices, scores, with the weights in a file of their own.

    `weight` is the size of the weights' first column; all others are of about 1.
    """
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = ("w0", "w1", "w2", "w3", "ws", "wp")
    arrays = {name: rng.normal(size=(WIDTH, WIDTH)).astype(dtype) for name in names}
    arrays["w0"][:, 0] *= dtype(weight)
    whole = {"k": np.array([KEEP]), "last": np.array([2])}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], "stem/Cast_0", to=kind),
        helper.make_node("MatMul", ["x", "w0"], ["a"], "encoder.layers.0.fc1/MatMul_1"),
        helper.make_node("Tanh", ["a"], ["b"], "encoder.layers.0.act/Tanh_2"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], "encoder.layers.0.fc2/MatMul_3"),
        helper.make_node("Tanh", ["c"], ["d"], "encoder.layers.1.act/Tanh_4"),
        helper.make_node("MatMul", ["d", "w2"], ["e"], "encoder.layers.1.fc1/MatMul_5"),
        helper.make_node("MatMul", ["d", "w3"], ["f"], "encoder.layers.1.fc2/MatMul_6"),
        helper.make_node("Mul", ["e", "f"], ["tokens"], "encoder.layers.1/Mul_7"),
        helper.make_node("MatMul", ["d", "ws"], ["attention"], "encoder.layers.1.attention/MatMul_8"),
        helper.make_node("Add", ["tokens", "attention"], ["mixed"], "scorer/Add"),
        helper.make_node("Cast", ["mixed"], ["wide"], "scorer/widen", to=TensorProto.FLOAT),
        helper.make_node("ReduceL1", ["wide", "last"], ["scores"], "scorer/ReduceL1", keepdims=0),
        helper.make_node("TopK", ["scores", "k"], ["best", "kept_indices"], "select/top", axis=1, sorted=1),
        helper.make_node("Unsqueeze", ["kept_indices", "last"], ["column"], "select/column"),
        helper.make_node("GatherND", ["tokens", "column"], ["rows"], "select/gather", batch_dims=1),
        helper.make_node("MatMul", ["rows", "wp"], ["projected"], "projector/linear/MatMul"),
        helper.make_node("Cast", ["projected"], ["features"], "projector/widen", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", TOKENS, WIDTH])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", KEEP, WIDTH]),
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, ["B", KEEP]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", TOKENS]),
        ],
        [numpy_helper.from_array(value, name) for name, value in {**arrays, **whole}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    return path


def pictures(count: int, seed: int = 1) -> list[Prepared]:
    """What the graph takes."""
    drawn = np.random.default_rng(seed).normal(size=(count, 1, TOKENS, WIDTH)).astype(np.float32)
    return [Prepared({"pixels": one}) for one in drawn]
