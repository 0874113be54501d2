"""The rules of TensorRT's parser: each has graphs that break it, for the releases it holds for and for no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from svdprune.exporter.rules import DECODER_OPERATORS, check_graph, check_target, refuse_violations, releases_with
from svdprune.exporter.rules.check import WHOLE
from svdprune.exporter.rules.predicates import PREDICATES
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import RELEASES, TARGETS, find_target
from svdprune.runtime.traps import TENSORRT_RTX, TRAPS, parse_version
from tests.exporter.rule_graphs import BREAKS, KEEPS, model

BY_NAME = {trap.name: trap for trap in TRAPS}
VERSIONS = ("10.3", "10.6", "10.8", "10.13", "10.15", "10.16", "11.0", "11.4")
CASES = [(rule, name) for rule, graphs in BREAKS.items() for name in graphs]


def rules(graph: onnx.ModelProto, version: str = "11.4", runtime: str = "tensorrt") -> set[str]:
    return {violation.rule for violation in check_graph(graph, version, runtime)}


def test_every_rule_has_a_graph_that_breaks_it_and_a_way_to_be_seen() -> None:
    assert set(BREAKS) == set(BY_NAME)
    assert len(BY_NAME) == len(TRAPS)
    assert not PREDICATES.keys() & WHOLE
    assert PREDICATES.keys() | WHOLE <= set(BY_NAME)
    for trap in TRAPS:
        assert trap.name in PREDICATES.keys() | WHOLE or trap.operators, trap.name
        assert trap.sentence.endswith(".")
        assert trap.remedy
        assert trap.source


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_a_graph_breaks_its_rule_where_the_rule_holds(rule: str, name: str) -> None:
    trap, graph = BY_NAME[rule], BREAKS[rule][name]
    for version in VERSIONS:
        expected = not trap.rtx_only and trap.first <= parse_version(version)
        expected = expected and (trap.last is None or parse_version(version) <= trap.last)
        assert (rule in rules(graph, version)) == expected, version
    assert (rule in rules(graph, "11.4", TENSORRT_RTX)) == (trap.last is None)


@pytest.mark.parametrize("name", KEEPS)
def test_a_graph_that_keeps_to_the_rules_passes_everywhere(name: str) -> None:
    for release in RELEASES:
        assert check_graph(KEEPS[name], release.tensorrt) == [], release.name
    assert check_graph(KEEPS[name], "11.4", TENSORRT_RTX) == []


def test_what_the_decoder_needs_comes_by_release() -> None:
    attention, cache = BREAKS["attention"]["Attention"], BREAKS["decoder-operators"]["TensorScatter"]
    assert "attention" in rules(attention, "10.13")
    assert "attention" not in rules(attention, "10.14")
    assert "decoder-operators" in rules(cache, "10.14")
    assert rules(cache, "10.16") == rules(cache, "11.4") == set()


def test_the_decoder_is_planned_for_the_releases_that_have_its_operators() -> None:
    for target in TARGETS.values():
        able = releases_with(target, DECODER_OPERATORS)
        assert able == tuple(release for release in target.releases if parse_version(release.tensorrt) >= (10, 15))
    orin = releases_with(find_target("jetson-orin"), DECODER_OPERATORS)
    assert [release.tensorrt for release in orin] == ["10.16", "11.4"]
    assert releases_with(find_target("jetson-orin"), ("MatMul",)) == find_target("jetson-orin").releases


def test_a_violation_names_node_rule_and_remedy() -> None:
    graph = model("(float[2,4096] x) => (float[2,3841] y) <int64[1] k={3841}> { [best] y, i = TopK<axis=1>(x, k) }")
    (violation,) = check_graph(graph, "10.3")
    assert violation.where == "node 'best' (TopK)"
    assert (violation.rule, violation.detail) == ("topk-limit", "K is 3841")
    assert "--keep 3840" in violation.remedy
    assert str(violation).startswith("node 'best' (TopK) breaks the rule topk-limit (")
    graph.graph.node[0].name = ""
    assert check_graph(graph, "10.3")[0].where == "the node that makes 'y' (TopK)"


def test_bodies_and_functions_are_looked_at() -> None:
    loop = model(
        "(float[2,4] x) => (float[2,4] y) <int64 n={3}, bool c={1}> { [round] y = Loop(n, c, x) "
        "<body = b (int64 i, bool ci, float[2,4] a) => (bool co, float[2,4] o) "
        "{ co = Identity(ci) w = If(ci) <then_branch = t () => (float[4] p) { p = Unique(a) }, "
        "else_branch = e () => (float[4] q) { q = Unique(a) }> o = Abs(a) }> }"
    )
    places = {violation.where for violation in check_graph(loop, "11.4")}
    assert len(places) == 2
    assert all(place.endswith("in body of 'round'") for place in places)
    text = '<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[2,4] x) => (float[2,4] y) { y = my.twice(x) }'
    called = onnx.parser.parse_model(
        text + '<opset_import: ["": 18], domain: "my"> twice (a) => (b) { c = Add(a, a) [u] b = BitwiseNot(c) }'
    )
    (violation,) = check_graph(called, "11.4")  # the function's own name is no foreign operator
    assert violation.where == "node 'u' (BitwiseNot) in function 'twice'"


def test_a_body_sees_the_constants_and_types_around_it() -> None:
    graph = model(
        "(bool c, int32[2,4] x) => (int32[2,4] y) <int32 e={2}, int64[1] a={0}> { y = If(c) "
        "<then_branch = t () => (int32[2,4] p) { p = Pow(x, e) }, "
        "else_branch = f () => (int32[2,4] q) { r = ReduceSum<keepdims=1>(x, a) q = Add(x, r) }> }"
    )
    assert rules(graph, "10.3") == {"pow-base", "pow-exponent"}
    assert rules(graph) == set()


def test_a_constant_is_read_from_external_data(tmp_path: Path) -> None:
    zero = numpy_helper.from_array(np.array([0] * 999 + [1], np.int8), "z")
    scale = numpy_helper.from_array(np.full(1000, 0.5, np.float32), "s")
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=1)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 1000])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [2, 1000])],
        [scale, zero],
    )
    place = tmp_path / "q.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]),
        place,
        save_as_external_data=True,
        size_threshold=100,
    )
    assert list(tmp_path.glob("*")) != [place]
    assert {violation.rule for violation in check_graph(place, "10.3")} == {"qdq-zero"}


def test_models_of_onnx_ir_and_files_are_taken(tmp_path: Path) -> None:
    graph = BREAKS["topk-limit"]["K is 3841"]
    onnx.save(graph, tmp_path / "g.onnx")
    for form in (graph, ir.from_proto(graph), tmp_path / "g.onnx", str(tmp_path / "g.onnx")):
        assert [violation.rule for violation in check_graph(form, "10.3")] == ["topk-limit"]


def test_a_release_before_the_table_is_refused() -> None:
    with pytest.raises(UserError, match=r"begin with TensorRT 10\.3 and say nothing of 8\.6"):
        check_graph(KEEPS["Reduce"], "8.6")


def test_every_release_of_a_target_is_asked() -> None:
    graph = BREAKS["pow-base"]["integers"]
    found = check_target(graph, find_target("jetson-orin"))
    assert {name: bool(violations) for name, violations in found.items()} == {
        "TensorRT 10.3 (JetPack 6.2)": True,
        "TensorRT 10.16 (JetPack 7.2)": False,
        "TensorRT 11.4 (JetPack 7.2.2)": False,
    }
    assert check_target(graph, find_target("cpu")) == {}
    nonzero = check_target(BREAKS["data-dependent-rtx"]["NonZero"], find_target("rtx-40"))
    assert [name for name, violations in nonzero.items() if violations] == ["TensorRT-RTX"]


def test_a_refusal_is_one_sentence_with_the_count_of_the_others() -> None:
    target = find_target("jetson-orin")
    found = check_target(BREAKS["pow-base"]["integers"], target)
    with pytest.raises(UserError) as caught:
        refuse_violations(found, "vision graph", target)
    said = str(caught.value)
    assert said.startswith("the vision graph cannot become an engine on jetson-orin: for TensorRT 10.3 (JetPack 6.2), ")
    assert "pow-base" in said
    assert "cast to float first" in said
    assert said.endswith("(and 1 more of the kind)")  # the exponent
    refuse_violations(check_target(KEEPS["Reduce"], target), "vision graph", target)
