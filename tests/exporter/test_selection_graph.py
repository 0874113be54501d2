"""The ONNX form as a graph: what engines ask of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from svdprune.exporter.estimate.counting import selection_work
from svdprune.exporter.selection import SelectorConfig, selector_model, selector_names

# What TensorRT 10.3's parser takes at opset 18 of what scorers use
ORDINARY = {
    "Abs", "Add", "ArgMax", "Cast", "Concat", "Div", "Equal", "Exp", "GatherND", "GreaterOrEqual", "Log", "MatMul",
    "Max", "Min", "Mul", "Pad", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Round",
    "Softmax", "Sqrt", "Squeeze", "Sub", "Sum", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip

CONFIGS = [*(SelectorConfig(name=name) for name in selector_names()), SelectorConfig(variance=0.9, centre=True)]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name if c.variance is None else "variance")
def test_the_graph_keeps_its_contract(config: SelectorConfig, gpu: bool) -> None:
    keep = 576 if config.name == "none" else 32
    proto = ir.to_proto(selector_model(config, 576, 384, grid=(24, 24), keep=keep, gpu=gpu))
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    names = ["tokens_in", "cls_attention"] if config.needs_cls_attention else ["tokens_in"]
    assert [i.name for i in proto.graph.input] == names
    assert [o.name for o in inferred.graph.output] == ["scores"]
    kind = inferred.graph.output[0].type.tensor_type
    assert kind.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_param or d.dim_value for d in kind.shape.dim] == ["batch", 576]
    assert {node.op_type for node in proto.graph.node} <= ORDINARY
    assert not {i.data_type for i in proto.graph.initializer} & {onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_the_scorer_stays_shallow_whatever_the_rank(rank: int) -> None:
    for gpu in (False, True):
        assert len(selector_model(SelectorConfig(rank=rank), 576, 1024, gpu=gpu).graph) <= 480
        assert len(selector_model(SelectorConfig(rank=16, variance=0.9), 576, 1024, gpu=gpu).graph) <= 720


def test_no_square_of_the_tokens_is_built() -> None:
    proto = ir.to_proto(selector_model(SelectorConfig(), 2880, 1024))
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info]
    assert len(shapes) > 400 and not [shape for shape in shapes if shape.count(2880) > 1]


def test_a_graph_for_a_cpu_does_less_arithmetic_and_one_for_a_gpu_has_fewer_products_in_a_row() -> None:
    works = {gpu: selection_work(SelectorConfig(), 576, 1024, 64, 1, (24, 24), gpu) for gpu in (False, True)}
    flops = {gpu: sum(work.flops for work in found) for gpu, found in works.items()}
    products = {gpu: sum(work.name == "matrix product" for work in found) for gpu, found in works.items()}
    assert flops[False] < 0.75 * flops[True]
    assert products[True] < 0.85 * products[False]


def test_the_same_settings_write_the_same_graph() -> None:
    first, second = (
        ir.to_proto(selector_model(SelectorConfig(seed=5), 60, 48)).SerializeToString(deterministic=True) for _ in "12"
    )
    assert first == second


def test_two_scorers_do_not_share_state() -> None:
    a = selector_model(SelectorConfig(rank=4), 60, 48)
    b = selector_model(SelectorConfig(rank=4), 60, 48, start=np.eye(48))
    assert not {id(v) for v in a.graph.initializers.values()} & {id(v) for v in b.graph.initializers.values()}
