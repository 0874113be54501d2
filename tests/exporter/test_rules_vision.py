"""The vision graphs keep to the rules of every release, JetPack 6.2's TensorRT 10.3 first."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from svdprune.exporter import vision
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.rules import check_graph, check_target
from svdprune.exporter.selection import SelectorConfig, selector_names
from svdprune.runtime.targets import RELEASES, TARGETS, find_target
from svdprune.runtime.traps import TENSORRT_RTX

KEEP, TOKENS = 4, 9


@pytest.fixture(scope="module")
def graph(tiny_llava: Path):
    """The vision graph for a selector, a precision and an input; what torch traces is traced once and copied."""
    traces: dict[tuple[object, ...], onnx.ModelProto] = {}
    traced = vision.traced

    def once(module, examples, outputs):
        given = tuple((name, example.dtype, tuple(example.shape)) for name, example in examples.items())
        key = (type(module).__name__, given, getattr(module, "dtype", None), *outputs)
        if key not in traces:
            traces[key] = ir.to_proto(traced(module, examples, outputs))
        return ir.from_proto(traces[key])

    checkpoint = Checkpoint(tiny_llava)
    family = family_of(checkpoint.config, "tiny")
    spec = family.describe(checkpoint)

    def build(name: str, precision: str, raw: bool) -> onnx.ModelProto:
        keep = TOKENS if name == "none" else KEEP
        config = SelectorConfig(name=name, rank=4)
        return ir.to_proto(vision.build_vision(checkpoint, family, spec, config, keep, precision=precision, raw=raw))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "traced", once)
        yield build


@pytest.mark.parametrize("name", selector_names())
@pytest.mark.parametrize(
    ("precision", "raw"),
    [
        ("fp32", True),
        ("fp16", False),
        pytest.param("fp16", True, marks=pytest.mark.slow),
        pytest.param("fp32", False, marks=pytest.mark.slow),
    ],
    ids=["fp32-uint8", "fp16-float32", "fp16-uint8", "fp32-float32"],
)
def test_a_vision_graph_keeps_to_the_rules_of_every_release(graph, name: str, precision: str, raw: bool) -> None:
    model = graph(name, precision, raw)
    for release in RELEASES:
        assert check_graph(model, release.tensorrt) == [], release.name
    assert check_graph(model, "11.4", TENSORRT_RTX) == []


def test_only_the_cast_reads_the_bytes(graph) -> None:
    model = graph("leverage", "fp32", True)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    readers = [node for node in model.graph.node if "pixels" in node.input]
    assert [node.op_type for node in readers] == ["Cast"]
    assert model.graph.node[0] == readers[0]


def test_a_graph_with_the_bytes_turned_first_is_seen(graph) -> None:
    """What the tracer makes when the cast does not come first: 10.3 refuses it, and so does the check."""
    model = graph("norm", "fp32", True)
    turned = onnx.helper.make_node("Transpose", ["pixels"], ["turned"], name="turn", perm=[0, 1, 3, 2])
    model.graph.node[0].input[0] = "turned"
    model.graph.node.insert(0, turned)
    (violation,) = check_graph(model, "10.3")
    assert (violation.where, violation.rule) == ("node 'turn' (Transpose)", "uint8")
    assert "--input float32" in violation.remedy


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_the_graph_in_every_release(graph, name: str) -> None:
    found = check_target(graph("leverage", "fp32", True), find_target(name))
    assert len(found) >= len(find_target(name).releases)
    assert not any(found.values())
