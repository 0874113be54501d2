"""Sites, ranges, Q/DQ, blocks in float again, and the choice of blocks: on a graph small enough to check by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp_float8

from svdprune.calib.quantise import (
    SCHEMES,
    Change,
    Judge,
    Magnitudes,
    choose,
    collect_ranges,
    find_sites,
    quantise_all,
    restore_float,
    sweep,
)
from svdprune.calib.quantise.judge import Seen, compare
from svdprune.calib.quantise.sites import block_of, blocks
from svdprune.calib.quantise.sweep import damage
from svdprune.runtime.errors import NumericalError
from tests.calib.quantise_graph import pictures, write_graph

INT8, FP8 = SCHEMES["int8"], SCHEMES["fp8"]
SITES = [
    "encoder.layers.0.fc1/MatMul_1",
    "encoder.layers.0.fc2/MatMul_3",
    "encoder.layers.1.fc1/MatMul_5",
    "encoder.layers.1.fc2/MatMul_6",
]


def quantised(folder: Path, scheme=INT8, dtype=np.float32, rule: str = "max", weight: float = 1.0, **options):
    """The float graph's path and the quantised one's, and the sites."""
    plain, whole = write_graph(folder / "plain.onnx", dtype, weight), folder / "whole.onnx"
    sites = find_sites(onnx.load(plain, load_external_data=False).graph, scheme)
    ranges = collect_ranges(plain, list(dict.fromkeys(s.activation for s in sites)), pictures(8))
    quantise_all(plain, whole, sites, ranges, scheme, rule, **options)
    return plain, whole, sites


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layers.3.mlp.fc1/MatMul_51", "encoder.layers.3"),
        ("encoder.layers.11/Add_2", "encoder.layers.11"),
        ("stages.0.blocks.2.fc/MatMul", "stages.0"),
        ("embeddings.patch_embedding/Conv_261", "embeddings.patch_embedding"),
        ("MatMul_7", "MatMul_7"),
    ],
)
def test_a_block_is_the_first_numbered_module(name, block):
    assert block_of(name) == block


def test_only_the_encoders_products_with_a_weight_are_sites(tmp_path):
    graph = onnx.load(write_graph(tmp_path / "g.onnx")).graph
    sites = find_sites(graph, INT8)
    assert [site.node for site in sites] == SITES  # neither the scorer's, nor what feeds it alone, nor the projector's
    assert blocks(sites) == ["encoder.layers.0", "encoder.layers.1"]
    assert sites[0].activation == "x" and sites[0].weight == "w0"


def test_magnitudes_of_known_values():
    seen = Magnitudes()
    seen.add(np.array([[3.0, -4.0], [0.0, 0.0]], np.float16))
    seen.add(np.zeros(4, np.float32))
    assert seen.largest == 4.0 and seen.counts.sum() == 8 and seen.spread == pytest.approx((25 / 8) ** 0.5)
    assert seen.range("max", 127) == 4.0
    assert Magnitudes().range("mse", 127) == 0.0


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_cauchy"])
def test_the_mse_rule_is_the_best_clip_in_fact(draw):
    values = getattr(np.random.default_rng(0), draw)(size=20_000).astype(np.float32)
    seen = Magnitudes()
    seen.add(values)

    def error(clip: float) -> float:
        step = clip / 127
        return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).mean())

    best = min(error(seen.largest * 0.5 ** (k / 16)) for k in range(97))
    assert error(seen.range("mse", 127)) <= 1.05 * best


def test_the_distribution_rule_is_onnx_runtimes():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    seen = Magnitudes()
    seen.add(values)
    scale = compute_scale_zp_float8(onnx.TensorProto.FLOAT8E4M3FN, np.float32(seen.spread))[1]
    assert seen.range("distribution", 448) / 448 == pytest.approx(float(scale), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_magnitudes_refuse_what_is_no_number(bad):
    with pytest.raises(NumericalError, match="no scales can be set"):
        Magnitudes().add(np.array([1.0, bad], np.float32))


def test_ranges_are_those_of_the_graph_and_nothing_stays(tmp_path):
    plain = write_graph(tmp_path / "plain.onnx")
    seen = pictures(5)
    done: list[int] = []
    found = collect_ranges(plain, ["x", "b"], seen, report=done.append)
    w0 = arrays(onnx.load(plain))["w0"]
    fed = np.concatenate([picture.inputs["pixels"] for picture in seen])
    assert found["x"].largest == np.abs(fed).max()
    assert found["b"].largest == pytest.approx(float(np.abs(np.tanh(fed @ w0)).max()), rel=1e-6)
    assert done == [1, 2, 3, 4, 5]
    assert sorted(place.name for place in tmp_path.iterdir()) == ["plain.onnx", "plain.onnx.data"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("scheme", "kind"), [(INT8, onnx.TensorProto.INT8), (FP8, onnx.TensorProto.FLOAT8E4M3FN)])
def test_the_form_is_what_tensorrt_takes(tmp_path, scheme, kind, dtype):
    plain, whole, _ = quantised(tmp_path, scheme, dtype)
    onnx.checker.check_model(str(whole), full_check=True)
    model = onnx.load(whole)
    counts = {op: sum(node.op_type == op for node in model.graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
    assert counts == {"QuantizeLinear": 4, "DequantizeLinear": 8}  # a pair a site, and one DQ a weight
    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[2]].data_type == kind
            assert not numpy_helper.to_array(tensors[node.input[2]]).astype(np.float32).any()
            assert numpy_helper.to_array(tensors[node.input[1]]).dtype == dtype
        if node.name in SITES:
            assert [producers[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
            scale = numpy_helper.to_array(tensors[producers[node.input[1]].input[1]])
            assert scale.shape == ((8,) if scheme.per_channel else ())
    used = [node.input[0] for node in model.graph.node if node.name in SITES]
    assert len(set(used)) == 4  # no two sites share a pair
    others = {node.name for node in onnx.load(plain).graph.node} - {node.name for node in model.graph.node}
    assert not others
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == {"": 18 if dtype == np.float32 and scheme is INT8 else 19}


def test_integer_codes_are_the_weights(tmp_path):
    plain, whole, _ = quantised(tmp_path)
    before, after = arrays(onnx.load(plain)), arrays(onnx.load(whole))
    for name in ("w0", "w3"):
        scale = np.abs(before[name]).max(0) / 127
        np.testing.assert_allclose(after[f"{name}_scale"], scale, rtol=1e-6)
        np.testing.assert_array_equal(after[f"{name}_quantized"], np.rint(before[name] / scale))
        assert name not in after
    assert np.abs(after["w0_quantized"].astype(int)).max() == 127


def test_narrow_weights_use_seven_bits(tmp_path):
    _, whole, _ = quantised(tmp_path, narrow_weights=True)
    assert np.abs(arrays(onnx.load(whole))["w0_quantized"].astype(int)).max() <= 64


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_a_channel_too_small_for_a_half_scale_is_not_blown_up(tmp_path, scheme):
    """A scale too small for float16 would become 1 in ONNX Runtime's own hands."""
    plain, whole, _ = quantised(tmp_path, scheme, np.float16, weight=2.0**-18)
    before, after = arrays(onnx.load(plain))["w0"], arrays(onnx.load(whole))
    codes, scale = after["w0_quantized"].astype(np.float32), after["w0_scale"].astype(np.float32)
    error = np.abs(codes * scale - before)[:, 0].max()
    assert scale.min() >= 2.0**-14 and scale.max() < 0.1 and error <= max(2.0**-13, np.abs(before).max() / 448 / 64)


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_it_computes_nearly_what_the_float_graph_computes(tmp_path, scheme):
    plain, whole, _ = quantised(tmp_path, scheme)
    change = Judge(plain, pictures(20, seed=5)).change(whole)
    assert 0.99 < change.cosine < 1.0 and change.worst_cosine <= change.cosine
    assert change.overlap > 0.7 and 0 < change.scores < 0.1


def test_blocks_in_float_again(tmp_path):
    plain, whole, sites = quantised(tmp_path)
    plain_model, whole_model = (onnx.load(path, load_external_data=False) for path in (plain, whole))
    between = tmp_path / "between.onnx"

    def change(*names: str) -> Change:
        between.write_bytes(restore_float(whole_model, plain_model, sites, names).SerializeToString())
        onnx.checker.check_model(str(between), full_check=True)
        return judge.change(between)

    judge = Judge(plain, pictures(20, seed=5))
    all_of_it, first, second = change(), change("encoder.layers.0"), change("encoder.layers.1")
    assert max(first.scores, second.scores) < all_of_it.scores
    assert change("encoder.layers.0", "encoder.layers.1") == Change(
        pytest.approx(1.0), pytest.approx(1.0), 1.0, 1.0, 0.0
    )
    again = onnx.load(between, load_external_data=False)
    assert {node.name for node in again.graph.node} == {node.name for node in plain_model.graph.node}
    assert {i.name for i in again.graph.initializer} == {i.name for i in plain_model.graph.initializer}


def test_compare_counts_what_changed():
    def seen(tokens, kept, scores):
        return Seen(np.array(tokens, np.float32), np.zeros((2, 1)), np.array(kept), np.array(scores))

    reference = [seen([[1, 0], [0, 1]], [0, 1], [0.5, 0.5, 0.0]), seen([[1, 0], [0, 1]], [0, 1], [0.5, 0.5, 0.0])]
    ours = [seen([[2, 0], [1, 0]], [0, 2], [0.5, 0.25, 0.25]), reference[1]]
    assert compare(ours, reference) == Change(0.75, 0.5, 0.75, 0.5, 0.125)


GOOD = Change(0.9999, 0.999, 1.0, 1.0, 0.0)


def fake(losses: dict[str, float]):
    """A measurement in which each quantised block costs its share of the overlap."""
    return lambda left_out: dataclasses.replace(
        GOOD, overlap=1.0 - sum(loss for name, loss in losses.items() if name not in left_out)
    )


def test_the_sweep_orders_by_damage_the_later_first():
    order = sweep(["a", "b", "c"], fake({"a": 0.01, "b": 0.3, "c": 0.01}))
    assert [item.block for item in order] == ["b", "c", "a"]
    assert order[0].change.overlap == pytest.approx(0.7)
    assert damage(order[0].change) > damage(order[1].change)


@pytest.mark.parametrize(
    ("losses", "left_out", "met"),
    [
        ({"a": 0.01, "b": 0.01, "c": 0.01, "d": 0.01}, [], True),
        ({"a": 0.02, "b": 0.3, "c": 0.02, "d": 0.0}, ["b"], True),
        ({"a": 0.3, "b": 0.2, "c": 0.02, "d": 0.0}, ["a", "b"], True),
        ({"a": 0.3, "b": 0.2, "c": 0.1, "d": 0.0}, ["a", "b"], False),  # half of the blocks is the most
    ],
)
def test_the_fewest_blocks_that_do(losses, left_out, met):
    choice = choose(sweep(list(losses), fake(losses)), fake(losses))
    assert (choice.float_blocks, choice.met) == (left_out, met)


def test_where_nothing_helps_the_least_damaging_choice_is_kept():
    order = sweep(["a", "b"], fake({"a": 0.2, "b": 0.2}))
    worse = dataclasses.replace(GOOD, overlap=0.1)
    choice = choose(order, lambda left_out: worse if left_out else dataclasses.replace(GOOD, overlap=0.6))
    assert choice.float_blocks == [] and not choice.met
