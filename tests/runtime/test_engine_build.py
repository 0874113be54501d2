"""``build_engines`` on fakes that compute: what is built, reused, refused, tested by the golden case and kept."""

from __future__ import annotations

import _thread
import errno
import json
import shutil
import signal
import time
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
import tiny_engines
from fake_trt import make_trt, uninstall
from fake_trt_common import engine_content

from svdprune.runtime.bundle import open_bundle, write_bundle
from svdprune.runtime.engines import build as module
from svdprune.runtime.engines.build import BuildRequest, build_engines
from svdprune.runtime.engines.key import BuildOptions
from svdprune.runtime.engines.store import list_engines
from svdprune.runtime.errors import BundleError, SvdpruneError, UserError
from svdprune.runtime.machine import Gpu, HostMemory

APIS = [("tensorrt-10.3", 87), ("tensorrt-10.16", 87), ("tensorrt-11.4", 87), ("tensorrt_rtx-1.7", 89)]
TARGETS = {87: "jetson-orin", 89: "rtx-40"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The tiny bundle with its golden case. Copy it."""
    folder = tmp_path_factory.mktemp("golden")
    return golden.golden_bundle(tiny.make_bundle(folder / "plain", target="jetson-orin"), folder / "bundle")


@pytest.fixture
def path(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def machine(monkeypatch, api="tensorrt-10.3", sm=87, gpu=True, free=10**11):
    """A machine with a TensorRT and perhaps its GPU; the fake module."""
    for name in ("tensorrt", "tensorrt_rtx"):
        uninstall(monkeypatch, name)
    _, trt = tiny_engines.machine(monkeypatch, api, sm)
    if not gpu:
        trt.fake.sm = None
    monkeypatch.setattr(module, "local_gpu", lambda: Gpu("NVIDIA Fake", sm, True, free, free) if gpu else None)
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(free, free, 0))
    return trt


def names(path):
    """What lies under engines/, without the timing cache."""
    return sorted(place.name for place in (path / "engines").iterdir() if not place.name.startswith("timing-"))


@pytest.mark.parametrize(("api", "sm"), APIS)
def test_an_engine_is_built_tested_and_reused(path, monkeypatch, api, sm):
    trt = machine(monkeypatch, api, sm)
    steps = []
    report = build_engines(path, BuildRequest(target=TARGETS[sm]), lambda step, share: steps.append((step, share)))
    (result,) = report.parts
    info = result.engine.info
    assert (result.part, result.state, info["selftest"]) == ("vision", "built", "passed")
    assert info["key"]["sm"] == sm and info["key"]["version"] == trt.__version__ and info["target"] == TARGETS[sm]
    assert info["layers"] > 0 and info["seconds"] >= 0 and info["bytes"] == result.engine.path.stat().st_size
    assert info["selftest_measured"]["kept tokens"]["overlap"] == 1.0 and info["peak_memory"]["process"] > 0
    assert "building the vision engine" in {step for step, _ in steps}
    assert any("self-test passed" in note for note in report.notes)
    assert any("no decoder engine" in note for note in report.notes)
    before = len(trt.fake.called("build_serialized_network"))
    (again,) = build_engines(path, BuildRequest(target=TARGETS[sm])).parts
    assert again.state == "reused" and again.engine == result.engine and not again.checks
    assert len(trt.fake.called("build_serialized_network")) == before == 1
    (forced,) = build_engines(path, BuildRequest(target=TARGETS[sm], force=True)).parts
    assert forced.state == "rebuilt" and len(list_engines(open_bundle(path))) == 1


def test_every_option_reaches_tensorrt_and_the_key(path, monkeypatch):
    machine(monkeypatch)
    folders = set()
    for options in (
        BuildOptions(),
        BuildOptions(batch=(1, 2, 4)),
        BuildOptions(workspace=1 << 30),
        BuildOptions(level=0),
        BuildOptions(version_compatible=True),
    ):
        (result,) = build_engines(path, BuildRequest(options=options)).parts
        content = engine_content(result.engine.path.read_bytes())
        batch = [shape[0] for shape in content["profiles"][0]["pixels"]]
        assert tuple(batch) == options.batch and content["workspace"] == options.workspace
        assert content["level"] == (3 if options.level is None else options.level)
        assert ("VERSION_COMPATIBLE" in content["flags"]) == options.version_compatible
        folders.add(result.engine.path.parent.name)
    assert len(folders) == 5 == len(names(path))


def test_both_parts_with_two_profiles_for_the_decoder(tmp_path, monkeypatch):
    plain = tiny_engines.engine_bundle(tmp_path / "plain", target="jetson-orin")
    path = golden.golden_bundle(plain, tmp_path / "bundle")
    machine(monkeypatch, "tensorrt-10.16")
    report = build_engines(path, BuildRequest())
    assert [result.part for result in report.parts] == ["vision", "decoder"]
    assert [result.engine.selftest for result in report.parts] == ["passed", "passed"]
    content = engine_content(report.parts[1].engine.path.read_bytes())
    rows = [[shape[1] for shape in profile["inputs_embeds"]] for profile in content["profiles"]]
    assert rows == [[1, 2 * tiny.KEEP + 32, tiny_engines.CACHE], [1, 1, 2]]
    assert set(content["profiles"][0]) == {"inputs_embeds", "position_ids"}


def test_a_tensorrt_without_the_decoder_s_layers(tmp_path, monkeypatch):
    path = tiny_engines.engine_bundle(tmp_path / "bundle", target="jetson-orin")
    machine(monkeypatch, gpu=True)
    with pytest.raises(UserError, match=r"TensorRT 10\.3\.0 lacks the operators of its graph.*chained"):
        build_engines(path, BuildRequest(part="decoder"))
    assert not (path / "engines").exists()


def test_parts_that_are_not_there(path, monkeypatch):
    machine(monkeypatch)
    with pytest.raises(UserError, match="no decoder engine can be built: the bundle has no graph for it"):
        build_engines(path, BuildRequest(part="decoder"))
    with pytest.raises(UserError, match="no part is called 'encoder': choose one of vision, decoder, all"):
        build_engines(path, BuildRequest(part="encoder"))


def test_another_version_or_graph_makes_an_engine_stale(path, monkeypatch, tmp_path):
    machine(monkeypatch, "tensorrt-10.3")
    build_engines(path, BuildRequest())
    machine(monkeypatch, "tensorrt-10.16")
    (result,) = build_engines(path, BuildRequest()).parts
    assert result.state == "rebuilt" and result.stale == "built by version 10.3.0, this is 10.16.1.11"
    assert len(names(path)) == 1
    opened = open_bundle(path)
    with write_bundle(tmp_path / "changed") as writer:
        for name in opened.manifest.files:
            shutil.copy(path / name, writer.file(name))
        tiny.vision_graph(writer.file("vision.onnx"))
        with writer.file("vision.onnx").open("ab") as stream:  # an unknown field: another file of the same meaning
            stream.write(b"\xfa\x06\x01x")
        writer.manifest = opened.manifest
    shutil.copytree(path / "engines", tmp_path / "changed" / "engines")
    (result,) = build_engines(tmp_path / "changed", BuildRequest()).parts
    assert result.state == "rebuilt" and result.stale == "of another graph" and len(names(tmp_path / "changed")) == 1


def test_a_truncated_engine_is_rebuilt(path, monkeypatch):
    machine(monkeypatch)
    (first,) = build_engines(path, BuildRequest()).parts
    first.engine.path.write_bytes(b"short")
    (second,) = build_engines(path, BuildRequest()).parts
    assert second.state == "rebuilt" and "truncated" in second.stale and second.engine.selftest == "passed"


def test_engines_of_other_gpus_stay(path, monkeypatch):
    machine(monkeypatch, "tensorrt_rtx-1.7", gpu=False)
    build_engines(path, BuildRequest(target="rtx-40"))
    (result,) = build_engines(path, BuildRequest(target="rtx-30")).parts
    assert result.state == "built" and len(names(path)) == 2


def test_without_a_gpu_the_self_test_is_said_not_to_have_run(path, monkeypatch):
    machine(monkeypatch, "tensorrt_rtx-1.7", gpu=False)
    report = build_engines(path, BuildRequest(target="rtx-40"))
    (result,) = report.parts
    assert result.engine.selftest == "not run: no GPU"
    assert json.loads((result.engine.path.parent / "build.json").read_text())["selftest"] == "not run: no GPU"
    assert any("no result of TensorRT itself and nothing was run" in note for note in report.notes)
    assert any("self-test was not run: no GPU" in note for note in report.notes)
    machine(monkeypatch, "tensorrt_rtx-1.7", 89)  # the same bundle, now where the GPU is
    (result,) = build_engines(path, BuildRequest(target="rtx-40")).parts
    assert result.state == "reused" and result.engine.selftest == "passed"


def test_an_engine_that_fails_the_golden_case_is_not_kept(exported, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    wrong = random.normal(size=(tiny.KEEP, tiny.HIDDEN)).astype(np.float32)
    plain = tiny.make_bundle(tmp_path / "plain", target="jetson-orin")
    path = golden.golden_bundle(plain, tmp_path / "bundle", features=wrong)
    machine(monkeypatch)
    with pytest.raises(SvdpruneError, match=r"self-test failed \(.*vision features.*not kept: vision") as caught:
        build_engines(path, BuildRequest())
    assert caught.value.exit_code == 1 and names(path) == []


def test_an_engine_that_cannot_run_is_not_kept(path, monkeypatch):
    trt = machine(monkeypatch)
    trt.fake.execute = lambda _: False
    with pytest.raises(SvdpruneError, match="the self-test failed and the engine was not kept"):
        build_engines(path, BuildRequest())
    assert names(path) == []


@pytest.fixture
def interruptible():
    """Ctrl-C raises: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_partial_engine(path, monkeypatch, interruptible):
    trt = machine(monkeypatch)
    steps = []

    def interrupt(phase, step):
        steps.append((phase, step))
        if (phase, step) == ("Timing kernels", 1):
            _thread.interrupt_main()
            time.sleep(1.0)  # a kernel that takes its time: the waiting thread has asked to stop long before its end

    trt.fake.on_step = interrupt
    said = []
    with pytest.raises(KeyboardInterrupt):
        build_engines(path, BuildRequest(), lambda step, share: said.append(step))
    assert names(path) == [] and list_engines(open_bundle(path)) == []
    assert any(step.startswith("stopping") for step in said) and steps[-1] == ("Timing kernels", 1)
    trt.fake.on_step = None
    assert build_engines(path, BuildRequest()).parts[0].state == "built"


def test_a_failed_build_keeps_the_engine_before(path, monkeypatch):
    trt = machine(monkeypatch)
    (before,) = build_engines(path, BuildRequest()).parts
    trt.fake.build_says = [("ERROR", "Error Code 2: OutOfMemory (no further information)")]
    with pytest.raises(SvdpruneError, match=r"vision engine with a workspace of 0\.25 GiB failed: memory ran out"):
        build_engines(path, BuildRequest(options=BuildOptions(workspace=1 << 28)))
    with pytest.raises(SvdpruneError, match="building the vision engine failed: memory ran out"):
        build_engines(path, BuildRequest(force=True))
    assert names(path) == [before.engine.path.parent.name]


def test_the_timing_cache_is_kept_for_the_version_and_the_gpu(path, monkeypatch):
    machine(monkeypatch)
    build_engines(path, BuildRequest())
    cache = path / "engines" / "timing-tensorrt-10.3.0-sm87.cache"
    assert cache.read_bytes() == b"sm87;one timing;"
    build_engines(path, BuildRequest(force=True))
    assert cache.read_bytes() == b"sm87;one timing;one timing;"
    machine(monkeypatch, "tensorrt_rtx-1.7", 89)
    build_engines(path, BuildRequest(target="rtx-40"))
    assert len(list((path / "engines").glob("timing-*"))) == 1  # TensorRT-RTX times nothing


def test_a_read_only_bundle(path, monkeypatch):
    trt = machine(monkeypatch)
    original = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name == "engines":
            raise OSError(errno.EROFS, "Read-only file system")
        original(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"engines cannot be written \(Read-only file system\)"):
        build_engines(path, BuildRequest())
    assert not trt.fake.called("build_serialized_network")


def test_too_little_memory_is_refused_unless_asked_otherwise(path, monkeypatch):
    machine(monkeypatch, free=10**8)
    with pytest.raises(UserError, match=r"memory to build: .* needed, 0\.10 GB of 0\.10 GB shared.*--no-preflight"):
        build_engines(path, BuildRequest())
    (result,) = build_engines(path, BuildRequest(check=False)).parts
    assert result.state == "built" and result.checks[0].state == "refused"


def test_a_workspace_below_the_least_is_refused_at_the_door(path, monkeypatch):
    machine(monkeypatch)
    with pytest.raises(UserError, match="--workspace is 1 MiB and the vision engine needs at least 4 MiB"):
        build_engines(path, BuildRequest(options=BuildOptions(workspace=1 << 20)))


def test_a_target_without_tensorrt(bundle, monkeypatch):
    machine(monkeypatch)
    with pytest.raises(UserError, match=r"the target is cpu, which has no TensorRT.*--target auto.*jetson-orin"):
        build_engines(bundle, BuildRequest(target="cpu"))
    with pytest.raises(UserError, match="the bundle was exported for cpu"):
        build_engines(bundle, BuildRequest())
    with pytest.raises(UserError, match="unknown target 'rtx-4'"):
        build_engines(bundle, BuildRequest(target="rtx-4"))


def test_full_tensorrt_needs_the_target_s_gpu(path, monkeypatch):
    machine(monkeypatch, gpu=False)
    with pytest.raises(UserError, match="there is no GPU here: run `svdprune build` on the Jetson AGX Orin"):
        build_engines(path, BuildRequest(runtime="tensorrt"))
    machine(monkeypatch, "tensorrt-10.16", 89)
    with pytest.raises(UserError, match=r"here the NVIDIA Fake \(sm 89\), and the target is jetson-orin \(sm 87\)"):
        build_engines(path, BuildRequest(runtime="tensorrt"))


@pytest.mark.parametrize(("target", "sm"), [("jetson-orin", 87), ("h100", 90), ("jetson-thor", 110)])
def test_what_tensorrt_rtx_does_not_build_for(path, monkeypatch, target, sm):
    machine(monkeypatch, "tensorrt_rtx-1.7", gpu=False)
    words = f"no engine for {target} can be built here.*not for sm {sm}: build on the device itself"
    for runtime in ("auto", "tensorrt_rtx"):
        with pytest.raises(UserError, match=words):
            build_engines(path, BuildRequest(target=target, runtime=runtime))


def test_auto_takes_full_tensorrt_where_the_gpu_is(path, monkeypatch):
    machine(monkeypatch, "tensorrt-10.16", 89)
    import fake_trt

    fake_trt.install(monkeypatch, make_trt("tensorrt_rtx-1.7", 89))
    assert build_engines(path, BuildRequest(target="rtx-40")).runtime == "TensorRT 10.16.1.11"
    monkeypatch.setattr(module, "local_gpu", lambda: None)
    assert build_engines(path, BuildRequest(target="rtx-30")).runtime == "TensorRT-RTX 1.7.1.116"


def test_no_tensorrt_at_all(path, monkeypatch):
    machine(monkeypatch)
    with monkeypatch.context() as patch:
        uninstall(patch, "tensorrt", "tensorrt_rtx")
        with pytest.raises(UserError, match=r"TensorRT for Python is not installed.*; .*tensorrt_rtx"):
            build_engines(path, BuildRequest())
        patch.setattr(module, "local_gpu", lambda: None)
        with pytest.raises(UserError, match=r"no GPU of sm 89, so that TensorRT-RTX alone.*svdprune\[rtx\]"):
            build_engines(path, BuildRequest(target="rtx-40"))


def test_a_graph_that_is_refused(path, monkeypatch):
    trt = machine(monkeypatch)
    trt.fake.parse_says = [("Svd", "odd", "No importer registered for op: Svd.")]
    with pytest.raises(UserError, match=r"at node odd \(Svd\): this TensorRT has no operator Svd"):
        build_engines(path, BuildRequest())
    assert names(path) == []


def test_a_changed_bundle_is_refused(path, monkeypatch):
    machine(monkeypatch)
    data = bytearray((path / "vision.onnx").read_bytes())
    data[-1] ^= 1
    (path / "vision.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        build_engines(path, BuildRequest())


def test_the_log_keeps_what_tensorrt_says(path, monkeypatch, tmp_path):
    machine(monkeypatch)
    build_engines(path, BuildRequest(log=tmp_path / "log.txt"))
    assert "[INFO] Total Activation Memory: 2048 bytes\n" in (tmp_path / "log.txt").read_text()
    with pytest.raises(UserError, match=r"the log .* cannot be written"):
        build_engines(path, BuildRequest(log=tmp_path / "none" / "log.txt", force=True))
