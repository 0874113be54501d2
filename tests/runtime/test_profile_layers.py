"""Times of layers: ONNX Runtime's profile and TensorRT's profiler and inspector come out as one kind of table."""

from __future__ import annotations

import json

import fake_trt
import numpy as np
import pytest
import tiny_engines
from golden import golden_bundle

from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.machine import Gpu
from svdprune.runtime.profile import trt_layers
from svdprune.runtime.profile.layers import layer_table, part_of
from svdprune.runtime.profile.measure import Plan, profile
from svdprune.runtime.profile.ort_layers import read_events
from svdprune.runtime.profile.stats import Summary


def test_percentiles():
    summary = Summary.of([0.1 * number for number in range(1, 12)])
    assert summary.median == pytest.approx(0.6) and summary.p90 == pytest.approx(1.0) and summary.count == 11
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0, 1)


def test_parts_by_the_exporter_s_names():
    assert part_of(["scorer/node_Abs_0"]) == part_of(["select/gather"]) == "selection"
    assert part_of(["projector/linear_1/MatMul_1"]) == "projector"
    assert part_of(["encoder.layers.0.self_attn.q_proj/MatMul_3"]) == "encoder"
    assert part_of(["select/gather", "layers.0/Add"]) == "encoder + selection"
    assert part_of([]) == "unknown"


def test_a_table_sums_up_runs():
    runs = [{"a": 1.0, "scorer/b": 3.0, "projector/c": 1.0}, {"a": 2.0, "scorer/b": 4.0, "projector/c": 1.0}]
    table = layer_table("test", runs, {"a": "Add", "scorer/b": "MatMul", "projector/c": "MatMul"}, {})
    assert [layer.name for layer in table.layers] == ["scorer/b", "a", "projector/c"]
    assert table.layers[0].share == pytest.approx(3.5 / 6) and table.operators == {"MatMul": 4.5, "Add": 1.5}
    assert table.parts["selection"].median == 3.5 and table.selection == table.parts["selection"]
    assert layer_table("test", [{"a": 1.0}], {}, {}).selection is None  # no selection in the graph


def test_a_selection_that_is_fused_is_not_guessed():
    mixed = layer_table("test", [{"x": 1.0, "s": 1.0}], {}, {"x": ["layers.0/a", "scorer/b"], "s": ["scorer/c"]})
    assert set(mixed.parts) == {"encoder + selection", "selection"} and mixed.selection is None
    unknown = layer_table("test", [{"x": 1.0, "s": 1.0}], {}, {"x": [], "s": ["scorer/c"]})
    assert unknown.selection is None
    thin = layer_table("test", [{"x": 0.001, "s": 1.0}], {}, {"x": [], "s": ["scorer/c"]})
    assert thin.selection is not None and thin.selection.median == 1.0


def event(kind, name, start, length, operator=""):
    return {"cat": kind, "name": name, "ts": start, "dur": length, "args": {"op_name": operator}}


def test_onnx_runtime_s_events_are_cut_into_runs():
    events = [event("Session", "session_initialization", 0, 50), event("Node", "x_kernel_time", 10, 5, "Add")]
    for start in (100, 200, 300):
        events += [
            event("Session", "model_run", start, 90),
            event("Node", "x_fence_before", start + 1, 1, "Add"),
            event("Node", "x_kernel_time", start + 2, start // 10, "Add"),
            event("Node", "select/top_kernel_time", start + 50, 7, "TopK"),
        ]
    table = read_events(events, warm_up=1)
    assert table.runs == 2 and [layer.name for layer in table.layers] == ["x", "select/top"]
    assert table.layers[0].seconds == pytest.approx(25e-6)
    assert table.selection is not None and table.selection.median == pytest.approx(7e-6)
    with pytest.raises(SvdpruneError, match="--layers 0"):
        read_events(events, warm_up=3)


class Runner:
    """Stands in for Polygraphy's TrtRunner: without a GPU, the context is enqueued and computes nothing."""

    def __init__(self, context, name):
        self.context, self.name = context, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, feed_dict, check_inputs=True):
        for name, array in feed_dict.items():
            assert self.context.set_input_shape(name, array.shape)
        engine = self.context.engine
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            self.context.set_tensor_address(name, 4096)
        assert self.context.execute_async_v3(1)
        return {}


@pytest.fixture
def polygraphy_runs(monkeypatch):
    """Polygraphy with a TrtRunner that needs no GPU; gives which module its backend was told to use."""
    pytest.importorskip("polygraphy", reason="profiling needs Polygraphy")
    import polygraphy.backend.trt
    import polygraphy.config

    monkeypatch.setattr(polygraphy.backend.trt, "TrtRunner", Runner)
    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", None)
    return polygraphy.config


@pytest.mark.parametrize("api", tiny_engines.APIS)
def test_tensorrt_s_profiler_reports_layers(api, bundle, tmp_path, monkeypatch, polygraphy_runs):
    trt = fake_trt.install(monkeypatch, fake_trt.make_trt(api, 87))
    trt.fake.execute = lambda execution: True
    path = golden_bundle(bundle, tmp_path / "golden")
    found = find_tensorrt(trt.__name__)
    engine = found.deserialize(tiny_engines.build(path, "vision", trt.__name__).path.read_bytes())
    pixels = np.ones((1, 28, 28, 3), np.uint8)
    table = trt_layers.engine_layers(found, engine, {"pixels": pixels}, runs=3, warm_up=2)
    assert table.runs == 3 and len(table.layers) == engine.num_layers
    assert {layer.seconds for layer in table.layers} == {0.25e-3} and table.operators.keys() == {"kgen"}
    assert polygraphy_runs.USE_TENSORRT_RTX is (trt.__name__ == "tensorrt_rtx")
    assert trt.fake.calls.count(("execute_async_v3", 1)) == 5


def test_the_inspector_tells_what_a_layer_is_made_of(monkeypatch):
    trt = fake_trt.make_trt("tensorrt-10.3", 87)
    layers = [
        {"Name": "__myl_Fc_0", "LayerType": "kgen", "Metadata": "[ONNX Layer: layers.0/a]\x1e[ONNX Layer: scorer/b]"},
        {"Name": "scorer/c + scorer/d", "LayerType": "PointWise"},
        "Reformatting CopyNode for Input Tensor 0 to select/top",
        {"Name": "__myl_1", "LayerType": "kgen", "Metadata": ""},
    ]

    class Inspector:
        execution_context = None

        def get_engine_information(self, form):
            assert form is trt.LayerInformationFormat.JSON and self.execution_context == "context"
            return json.dumps({"Layers": layers, "Bindings": []})

    class Engine:
        def create_engine_inspector(self):
            return Inspector()

    operators, nodes = trt_layers.inspect(trt, Engine(), "context")
    assert operators["__myl_Fc_0"] == "kgen" and operators["scorer/c + scorer/d"] == "PointWise"
    assert [part_of(nodes[name]) for name in operators] == ["encoder + selection", "selection", "selection", "unknown"]


def test_an_engine_is_profiled_whole(tmp_path, monkeypatch, polygraphy_runs):
    """Vision and decoder as engines: both arms run, the unpruned engine is built on the spot and nothing is left."""
    cuda, trt = tiny_engines.machine(monkeypatch)
    gpu = Gpu("a fake", 87, True, None, None)
    monkeypatch.setattr("svdprune.runtime.profile.where.local_gpu", lambda: gpu)
    monkeypatch.setattr("svdprune.runtime.profile.where.power_mode", lambda: "MAXN")
    path = golden_bundle(tiny_engines.engine_bundle(tmp_path / "engines"), tmp_path / "golden")
    for part in ("vision", "decoder"):
        tiny_engines.build(path, part)
    before = sorted(path.rglob("*"))
    compute = trt.fake.execute
    trt.fake.execute = lambda execution: execution.stream == 1 or compute(execution)  # 1: of `Runner`, without memory
    report = profile(path, "tensorrt", "tensorrt", plan=Plan(3, 1, 2))
    assert (report.pruned.prompt, report.unpruned.prompt) == (report.pruned.prompt, report.pruned.prompt + 12)
    assert report.where.kind == "GPU" and report.where.processor == "a fake (sm 87), power mode MAXN"
    assert report.where.versions["TensorRT"] == "10.3.0"
    assert report.pruned.layers is not None and report.unpruned.layers is not None
    assert "selection" not in report.pruned.stages and "not told apart" in report.pruned.notes[0]
    assert (cuda.held, len(cuda.pinned), cuda._streams) == (0, 0, set())
    assert sorted(path.rglob("*")) == before
