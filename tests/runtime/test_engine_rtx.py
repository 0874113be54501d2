"""Engines really built, by TensorRT-RTX on a CPU: that the fakes and the estimates have something to do with it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper

from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines import build as module
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.build import BuildRequest, build_engines
from svdprune.runtime.engines.key import BuildOptions
from svdprune.runtime.engines.preflight import estimate
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.errors import SvdpruneError, UserError

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The tiny bundle, on a machine that shows no GPU."""
    monkeypatch.setattr(module, "local_gpu", lambda: None)
    return tiny.make_bundle(tmp_path / "bundle")


def test_a_graph_is_built_for_each_gpu(path):
    folders = set()
    for target, sm in (("rtx-30", 86), ("rtx-40", 89), ("rtx-50", 120), ("a100", 80)):
        (result,) = build_engines(path, BuildRequest(target=target)).parts
        info = result.engine.info
        assert info["key"]["sm"] == sm and info["selftest"] == "not run: no GPU" and info["layers"] > 0
        assert info["bytes"] == result.engine.path.stat().st_size > 1000 and info["memory"]["Weights"] > 0
        folders.add(result.engine.path.parent.name)
    assert len(folders) == 4
    (again,) = build_engines(path, BuildRequest(target="rtx-40")).parts
    assert again.state == "reused"


@pytest.mark.parametrize("options", [{"batch": (1, 2, 4)}, {"level": 0}, {"workspace": 1 << 26}])
def test_options(path, options):
    (result,) = build_engines(path, BuildRequest(target="rtx-40", options=BuildOptions(**options))).parts
    assert result.state == "built"


def test_the_estimate_covers_the_build(path):
    (result,) = build_engines(path, BuildRequest(target="rtx-40")).parts
    needs = estimate(open_bundle(path), "vision", BuildOptions(), False)
    assert 0 < result.engine.info["peak_memory"]["added"] <= needs.build_host
    assert result.engine.info["bytes"] <= needs.engine


def test_orin_hopper_and_thor_are_refused(path):
    trt = find_tensorrt("tensorrt_rtx")
    assert not {87, 90, 110} & set(trt.capabilities) and {86, 89, 120} <= set(trt.capabilities)
    for target in ("jetson-orin", "h100", "jetson-thor"):
        with pytest.raises(UserError, match=f"no engine for {target} can be built here.*build on the device itself"):
            build_engines(path, BuildRequest(target=target))


def test_an_engine_cannot_be_opened_without_a_gpu_and_it_is_said(path):
    (result,) = build_engines(path, BuildRequest(target="rtx-40")).parts
    with pytest.raises(UserError, match=r"opening an engine with TensorRT-RTX .* failed: CUDA finds no driver"):
        find_tensorrt("tensorrt_rtx").deserialize(result.engine.path.read_bytes())


def write(path, nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in constants])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def test_what_the_parser_and_the_builder_refuse_is_explained(tmp_path):
    trt = find_tensorrt("tensorrt_rtx")
    bytes_first = write(
        tmp_path / "uint8.onnx",
        [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]), helper.make_node("Cast", ["t"], ["y"], to=1)],
        [value("x", TensorProto.UINT8, [2, 3])],
        [value("y", TensorProto.FLOAT, [3, 2])],
    )
    with pytest.raises(UserError, match="hands uint8 to an operator that TensorRT takes floats in"):
        trt.network_from_onnx(bytes_first)
    determinant = write(
        tmp_path / "det.onnx",
        [helper.make_node("Det", ["x"], ["y"], name="factor")],
        [value("x", TensorProto.FLOAT, [3, 3])],
        [value("y", TensorProto.FLOAT, [])],
    )
    with pytest.raises(UserError, match=r"at node factor \(Det\)"):
        trt.network_from_onnx(determinant)
    with pytest.raises(UserError, match="does not take"):
        trt.network_from_onnx(tmp_path / "absent.onnx")
    many = write(
        tmp_path / "topk.onnx",
        [helper.make_node("TopK", ["x", "k"], ["y", "i"])],
        [value("x", TensorProto.FLOAT, [1, 5000])],
        [value("y", TensorProto.FLOAT, [1, 4000])],
        [("k", np.array([4000]))],
    )
    log = BuildLog()
    network = trt.network_from_onnx(many, log)
    with pytest.raises(SvdpruneError, match="TopK takes at most 3840"):
        trt.build(network, trt.config(network, []), log, Progress(), "building")


def test_progress_reaches_the_end_and_a_build_can_be_stopped(path):
    trt, log, progress = find_tensorrt("tensorrt_rtx"), BuildLog(), Progress()
    network = trt.network_from_onnx(path / "vision.onnx", log)
    side = tiny.SIDE
    sizes = {"pixels": ((1, side, side, 3),) * 3}
    config = trt.config(network, [sizes], sm=89, monitor=trt.monitor(progress))
    assert trt.build(network, config, log, progress, "building").nbytes > 1000
    assert progress.share == 1.0 and log.layers > 0 and not log.errors
    stopped = Progress()
    stopped.cancelled = True
    config = trt.config(network, [sizes], sm=89, monitor=trt.monitor(stopped))
    assert trt.build(network, config, log, stopped, "building") is None
