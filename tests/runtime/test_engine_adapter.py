"""The adapter on fakes of every TensorRT: what it asks for, what it refuses, and what a removed name does to it."""

from __future__ import annotations

import sys
import types

import pytest
import tiny
from fake_trt import FULL, VERSIONS, install, make_trt, uninstall
from fake_trt_common import engine_content

from svdprune.runtime.engines import adapter, installation
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.errors import SvdpruneError, UserError

SIDE = tiny.SIDE
SIZES = {"pixels": ((1, SIDE, SIDE, 3), (1, SIDE, SIDE, 3), (4, SIDE, SIDE, 3))}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "vision.onnx"
    tiny.vision_graph(path)
    return path


def built(monkeypatch, api, graph, here=89, **options):
    """The header of an engine built through the adapter, and the fake module."""
    module = install(monkeypatch, make_trt(api, here))
    trt = find_tensorrt(module.__name__)
    log, progress = BuildLog(), Progress()
    network = trt.network_from_onnx(graph, log)
    config = trt.config(network, [SIZES], monitor=trt.monitor(progress), **options)
    data = trt.build(network, config, log, progress, "building")
    assert progress.share == 1.0
    return engine_content(bytes(data)), module


@pytest.mark.parametrize("api", VERSIONS)
def test_a_build_is_strongly_typed_without_tf32_and_detailed(monkeypatch, api, graph):
    content, module = built(monkeypatch, api, graph)
    assert content["typed"] and "TF32" not in content["flags"] and content["verbosity"] == "DETAILED"
    assert module.fake.called("clear_flag") == [("TF32",)]
    assert content["profiles"][0]["pixels"][2][0] == 4
    assert content["workspace"] is None and content["level"] == 3


@pytest.mark.parametrize("api", FULL)
def test_tensorrt_10_gets_the_flag_explicitly(monkeypatch, api, graph):
    _, module = built(monkeypatch, api, graph)
    flag = int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert module.fake.called("create_network") == [(1 << flag,)]


@pytest.mark.parametrize("api", VERSIONS)
def test_workspace_and_level(monkeypatch, api, graph):
    content, _ = built(monkeypatch, api, graph, workspace=1 << 28, level=5)
    assert content["workspace"] == 1 << 28 and content["level"] == 5


@pytest.mark.parametrize("api", FULL)
def test_version_compatible(monkeypatch, api, graph):
    content, _ = built(monkeypatch, api, graph, version_compatible=True)
    assert content["flags"] == ["VERSION_COMPATIBLE"]


def test_tensorrt_rtx_builds_for_a_named_gpu_only(monkeypatch, graph):
    assert built(monkeypatch, "tensorrt_rtx-1.7", graph, here=None, sm=120)[0]["sm"] == [120]
    assert built(monkeypatch, "tensorrt_rtx-1.7", graph, here=None)[0]["sm"] == []
    trt = find_tensorrt("tensorrt_rtx")
    assert trt.capabilities == (75, 80, 86, 89, 120, 121) and not trt.needs_gpu and not trt.keeps_timings
    network = trt.network_from_onnx(graph)
    for sm in (87, 90, 110):
        with pytest.raises(UserError, match=rf"not for sm {sm}: build on the device itself"):
            trt.config(network, [SIZES], sm=sm)
    with pytest.raises(UserError, match="builds no version-compatible engines"):
        trt.config(network, [SIZES], version_compatible=True)


@pytest.mark.parametrize(("api", "takes"), [(name, name != "tensorrt-10.3") for name in VERSIONS])
def test_who_takes_the_decoder(monkeypatch, api, takes):
    install(monkeypatch, make_trt(api))
    assert find_tensorrt(api.partition("-")[0]).takes_decoder is takes


def test_the_use_of_a_removed_flag_would_be_seen(monkeypatch, graph):
    """The proof that these fakes guard anything: the adapter, changed to set FP16, fails on 11 and not on 10."""
    original = adapter.TensorRt.config

    def old_habits(self, network, profiles, **options):
        config = original(self, network, profiles, **options)
        config.set_flag(self.module.BuilderFlag.FP16)
        return config

    monkeypatch.setattr(adapter.TensorRt, "config", old_habits)
    assert "FP16" in built(monkeypatch, "tensorrt-10.16", graph)[0]["flags"]
    with pytest.raises(AttributeError, match="FP16"):
        built(monkeypatch, "tensorrt-11.4", graph)


def test_a_missing_progress_monitor_is_done_without(monkeypatch, graph):
    module = install(monkeypatch, make_trt("tensorrt-10.3"))
    del module.IProgressMonitor
    assert find_tensorrt("tensorrt").monitor(Progress()) is None


def test_a_timing_cache_is_filled_and_one_of_another_gpu_is_left_aside(monkeypatch, graph):
    trt = find_tensorrt(install(monkeypatch, make_trt("tensorrt-10.16", 87)).__name__)
    new = b"sm87;one timing;"
    for given, kept in ((b"", new), (b"sm87;more;", b"sm87;more;one timing;"), (b"sm89;x", new)):
        network = trt.network_from_onnx(graph)
        config = trt.config(network, [SIZES], timings=given)
        trt.build(network, config, BuildLog(), Progress(), "building")
        assert trt.timings_of(config) == kept


def test_a_cancelled_build_gives_nothing(monkeypatch, graph):
    module = install(monkeypatch, make_trt("tensorrt-11.4"))
    trt, progress = find_tensorrt("tensorrt"), Progress()
    module.fake.on_step = lambda phase, step: setattr(progress, "cancelled", phase.startswith("Timing"))
    network = trt.network_from_onnx(graph)
    config = trt.config(network, [SIZES], monitor=trt.monitor(progress))
    assert trt.build(network, config, BuildLog(), progress, "building") is None
    assert 0.5 <= progress.share < 1 and progress.phase == "Timing kernels"


def test_a_failed_build_is_explained(monkeypatch, graph):
    module = install(monkeypatch, make_trt("tensorrt-10.3", 87))
    trt = find_tensorrt("tensorrt")
    for lines, words in (
        ([("WARNING", "Requested amount of GPU memory (4294967296 bytes) could not be allocated."),
          ("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a]}.)")],
         "memory ran out: close other programs"),
        ([("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node a + b.)")],
         "no implementation for a; with little memory that is how it reports a lack of it"),
        ([("INTERNAL_ERROR", "[x.cpp::f::1] Error Code 2: Internal Error (Assertion p failed. )")],
         r"\(\[x.cpp::f::1\] Error Code 2: .*--log FILE"),
    ):  # fmt: skip
        module.fake.build_says = lines
        log = BuildLog()
        network = trt.network_from_onnx(graph, log)
        with pytest.raises(SvdpruneError, match=f"^building it failed.*{words}") as caught:
            trt.build(network, trt.config(network, [SIZES]), log, Progress(), "building it")
        assert caught.value.exit_code == 1
    with pytest.raises(SvdpruneError, match="no sizes for"):
        module.fake.build_says, log = [], BuildLog()
        network = trt.network_from_onnx(graph, log)
        trt.build(network, trt.config(network, []), log, Progress(), "building")


def test_a_graph_that_is_not_taken_names_the_node(monkeypatch, graph, tmp_path):
    module = install(monkeypatch, make_trt("tensorrt-10.3"))
    trt = find_tensorrt("tensorrt")
    module.fake.parse_says = [("Einsum", "scorer/odd", "No importer registered for op: Einsum. Attempting ...")]
    words = r"TensorRT 10.3.0 does not take .* at node scorer/odd \(Einsum\).*no operator Einsum"
    with pytest.raises(UserError, match=words):
        trt.network_from_onnx(graph)
    module.fake.parse_says = [("", "", "something else\nand more")]
    with pytest.raises(UserError, match=r"\(something else\): export"):
        trt.network_from_onnx(graph)


@pytest.mark.parametrize("api", FULL)
def test_no_gpu(monkeypatch, api, graph):
    install(monkeypatch, make_trt(api, sm=None))
    trt = find_tensorrt("tensorrt")
    with pytest.raises(UserError, match=r"starting TensorRT .*CUDA error 35.*no GPU here"):
        trt.network_from_onnx(graph)
    with pytest.raises(UserError, match="CUDA error 35"):
        trt.deserialize(b"x")


def test_engines_that_do_not_fit(monkeypatch, graph):
    def engine(api, sm, **options):
        trt = find_tensorrt(install(monkeypatch, make_trt(api, sm)).__name__)
        network = trt.network_from_onnx(graph)
        config = trt.config(network, [SIZES], **options)
        return trt, bytes(trt.build(network, config, BuildLog(), Progress(), "building"))

    old, data = engine("tensorrt-10.3", 87)
    assert old.deserialize(data).num_layers > 0 and old.deserialize(memoryview(data)).num_io_tensors == 4
    portable = engine("tensorrt-10.3", 87, version_compatible=True)[1]
    other_gpu, _ = engine("tensorrt-10.3", 89)
    newer, _ = engine("tensorrt-10.16", 87)
    rtx, _ = engine("tensorrt_rtx-1.7", 120)
    for trt, given, words in (
        (old, data[:-100], "truncated or was changed: run `svdprune build` again"),
        (old, data[:40], "truncated"),
        (old, b"not an engine", "not an engine of this kind"),
        (other_gpu, data, r"another GPU \(compute capability 8.7, this one is 8.9\)"),
        (newer, data, r"another TensorRT \(10.3.0, this one is 10.16.1.11\)"),
        (newer, portable, "another TensorRT"),
        (rtx, data, "do not read each other's"),
    ):
        with pytest.raises(UserError, match=words):
            trt.deserialize(given)
    assert newer.deserialize(portable, host_code=True) is not None


def test_tensorrt_that_is_missing_or_half_installed(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no TensorRT is called 'trt': choose one of tensorrt, tensorrt_rtx"):
        find_tensorrt("trt")
    with monkeypatch.context() as patch:
        uninstall(patch, "tensorrt", "tensorrt_rtx")
        with pytest.raises(UserError, match="TensorRT for Python is not installed: on a Jetson, `apt install"):
            find_tensorrt("tensorrt")
        with pytest.raises(UserError, match=r"pip install 'svdprune\[rtx\]'"):
            find_tensorrt("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))  # the package without its library
    with pytest.raises(UserError, match="half installed, its Python module has no Builder"):
        find_tensorrt("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt")
    for said, words in (
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
         "half installed, its library libnvinfer.so.10 is not found"),
        ("raise FileNotFoundError('Could not find: libnvinfer.so.11. Is it on your LD_LIBRARY_PATH?')",
         "its library libnvinfer.so.11 is not found"),
        ("raise ImportError('bad magic')", r"its import fails \(bad magic\): install it again"),
    ):  # fmt: skip
        (tmp_path / "tensorrt.py").write_text(said)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=words):
            find_tensorrt("tensorrt")
    install(monkeypatch, make_trt("tensorrt-10.3", version="8.6.1"))
    with pytest.raises(UserError, match=r"TensorRT 8.6.1 is too old"):
        find_tensorrt("tensorrt")


def test_titles():
    assert set(installation.TITLES) == set(adapter.RUNTIMES)
