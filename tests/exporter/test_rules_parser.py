"""The rules against what TensorRT-RTX's own parser and builder say, which needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest

from svdprune.exporter.rules import check_graph
from svdprune.runtime.traps import TENSORRT_RTX
from tests.exporter.rule_graphs import BREAKS, KEEPS, STRICTER

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

# In a process of its own: the parser may end it, and then the test says so instead of vanishing.
VERDICTS = """
import json, sys
from pathlib import Path
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
for place in sorted(Path(sys.argv[1]).glob("*.onnx"), key=lambda place: int(place.stem)):
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    taken = trt.OnnxParser(network, logger).parse(place.read_bytes())
    taken = taken and builder.build_serialized_network(network, builder.create_builder_config()) is not None
    print(json.dumps([int(place.stem), taken]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether TensorRT-RTX builds an engine of each graph."""
    folder = tmp_path_factory.mktemp("graphs")
    graphs = {f"{rule}: {name}": graph for rule, group in BREAKS.items() for name, graph in group.items()}
    graphs |= KEEPS
    for number, graph in enumerate(graphs.values()):
        onnx.save(graph, folder / f"{number}.onnx")
    child = [sys.executable, "-c", VERDICTS, str(folder)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    said = [taken for _, taken in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))]
    last = list(graphs)[min(len(said), len(graphs) - 1)]
    assert done.returncode == 0, f"TensorRT-RTX ended at the graph {last!r}: {done.stderr[-2000:]}"
    return dict(zip(graphs, said, strict=True))


@pytest.mark.parametrize("name", KEEPS)
def test_a_graph_that_keeps_to_the_rules_is_built(verdicts: dict[str, bool], name: str) -> None:
    assert verdicts[name]


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule, graphs in BREAKS.items() for name in graphs])
def test_the_parser_agrees_with_the_rules(verdicts: dict[str, bool], rule: str, name: str) -> None:
    """Refused by the rules where refused by the parser; the other way round too, but for the reasons in STRICTER."""
    refused = bool(check_graph(BREAKS[rule][name], "11.4", TENSORRT_RTX))
    taken = verdicts[f"{rule}: {name}"]
    if (rule, name) in STRICTER:
        assert taken, "the parser refuses it now: the exception is no longer needed"
    else:
        assert taken != refused


def test_the_exceptions_are_of_graphs_that_are_there() -> None:
    assert all(name in BREAKS.get(rule, {}) for rule, name in STRICTER)
