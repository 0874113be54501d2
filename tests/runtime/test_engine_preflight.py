"""The preflight: numbers against what is free, advice where it will not fit, and the least workspace."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_engines
from fake_trt import install, make_trt

from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines import preflight as module
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.key import BuildOptions
from svdprune.runtime.engines.preflight import check_workspace, estimate, preflight, refuse
from svdprune.runtime.errors import UserError
from svdprune.runtime.machine import Gpu, HostMemory
from svdprune.runtime.manifest import FileInfo
from svdprune.runtime.targets import TARGETS

GB = 10**9
ORIN = Gpu("NVIDIA Jetson Orin Nano", 87, True, 8 * GB, 5 * GB)
ADA = Gpu("NVIDIA GeForce RTX 4090", 89, False, 24 * GB, 20 * GB)


@pytest.fixture
def heavy(tmp_path):
    """The tiny bundle, whose manifest claims graphs of 1 GB."""
    opened = open_bundle(tiny_engines.engine_bundle(tmp_path / "bundle"))
    files = opened.manifest.files | {
        name: FileInfo("0" * 64, GB) for name in (opened.manifest.vision.file, "decoder/engine.onnx")
    }
    return dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, files=files))


def checks(monkeypatch, bundle, api, gpu, memory, target="jetson-orin-nano", part="vision", power="MAXN", **options):
    monkeypatch.setattr(module, "power_mode", lambda: power)
    trt = find_tensorrt(install(monkeypatch, make_trt(api, gpu and gpu.sm)).__name__)
    lines = preflight(bundle, part, trt, TARGETS[target], BuildOptions(**options), gpu, memory)
    return {check.name: check for check in lines}


def test_a_jetson_with_room(monkeypatch, heavy):
    found = checks(monkeypatch, heavy, "tensorrt-10.3", ORIN, HostMemory(64 * GB, 50 * GB, 0))
    assert [check.state for check in found.values()] == ["ok"] * 4 and "power mode" in found
    building = found["memory to build"]
    assert "shared by CPU and GPU" in building.found and building.free == 50 * GB and building.needed > 4 * GB
    refuse(list(found.values()))


def test_a_jetson_without_room_is_refused_with_numbers_and_advice(monkeypatch, heavy):
    found = checks(monkeypatch, heavy, "tensorrt-10.3", ORIN, HostMemory(8 * GB, 4 * GB, 0))
    with pytest.raises(UserError) as caught:
        refuse(list(found.values()))
    for words in ("GB are needed, 4.00 GB of 8.00 GB", "stop the desktop", "add swap", "--workspace", "--no-preflight"):
        assert words in str(caught.value)
    found = checks(monkeypatch, heavy, "tensorrt-10.16", ORIN, HostMemory(8 * GB, 4 * GB, 0), part="decoder")
    assert "--part vision" in found["memory to build"].advice
    found = checks(monkeypatch, heavy, "tensorrt-10.3", ORIN, HostMemory(8 * GB, 4 * GB, 0), batch=(1, 1, 8))
    assert "--batch 1,1,1" in found["memory to build"].advice
    tight = found["memory to build"].needed * 1.05
    found = checks(monkeypatch, heavy, "tensorrt-10.3", ORIN, HostMemory(8 * GB, int(tight), 0), batch=(1, 1, 8))
    assert found["memory to build"].state == "warning"


def test_a_workspace_counts_towards_the_build(heavy):
    plain, limited = (estimate(heavy, "vision", BuildOptions(workspace=size), True) for size in (None, GB))
    assert limited.build_device - plain.build_device == GB and limited.build_host == plain.build_host
    assert estimate(heavy, "vision", BuildOptions(), False).build_device == 0


def test_estimates_grow_with_the_batch_and_the_cache(heavy):
    few, many = (estimate(heavy, "vision", BuildOptions(batch=(1, 1, most)), True).run_device for most in (1, 64))
    assert many > few
    engine = dataclasses.replace(heavy.manifest.decoder.engine, cache=10**6)
    decoder = dataclasses.replace(heavy.manifest.decoder, engine=engine)
    longer = dataclasses.replace(heavy, manifest=dataclasses.replace(heavy.manifest, decoder=decoder))
    short, long = (estimate(item, "decoder", BuildOptions(), True).run_device for item in (heavy, longer))
    rows = 10**6 - tiny_engines.CACHE
    assert long - short >= 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * rows * 4


def test_a_discrete_gpu_has_a_memory_of_its_own(monkeypatch, heavy):
    memory = HostMemory(64 * GB, 50 * GB, 0)
    found = checks(monkeypatch, heavy, "tensorrt-10.16", ADA, memory, "rtx-40")
    assert found["GPU memory to build"].state == "ok" and "power mode" not in found
    full = dataclasses.replace(ADA, free=GB)
    found = checks(monkeypatch, heavy, "tensorrt-10.16", full, memory, "rtx-40")
    check = found["GPU memory to build"]
    assert check.state == "refused" and "1.00 GB of 24.00 GB" in check.found
    silent = dataclasses.replace(ADA, free=None, total=None)
    found = checks(monkeypatch, heavy, "tensorrt-10.16", silent, None, "rtx-40")
    assert found["GPU memory to build"].state == found["memory to build"].state == "unknown"


def test_without_a_gpu_the_target_s_data_are_compared(monkeypatch, heavy):
    memory = HostMemory(64 * GB, 50 * GB, 0)
    found = checks(monkeypatch, heavy, "tensorrt_rtx-1.7", None, memory, "rtx-40")
    assert set(found) == {"memory to build", "memory to run", "TensorRT"}
    assert "GeForce RTX 4090 has 24.00 GB" in found["memory to run"].found
    assert "not the target's own TensorRT" in found["TensorRT"].found
    files = heavy.manifest.files | {heavy.manifest.vision.file: FileInfo("0" * 64, 30 * GB)}
    larger = dataclasses.replace(heavy, manifest=dataclasses.replace(heavy.manifest, files=files))
    found = checks(monkeypatch, larger, "tensorrt_rtx-1.7", None, HostMemory(200 * GB, 190 * GB, 0), "rtx-40")
    assert found["memory to run"].state == "warning" and "fewer tokens" in found["memory to run"].advice


@pytest.mark.parametrize(
    ("api", "state", "words"),
    [
        ("tensorrt-10.3", "ok", "of jetson-orin-nano's releases"),
        ("tensorrt-10.16", "ok", "of jetson-orin-nano's releases"),
        ("tensorrt-11.4", "warning", "releases have 10.3, 10.16"),
    ],
)
def test_the_version_is_compared_with_the_target_s_releases(monkeypatch, heavy, api, state, words):
    check = checks(monkeypatch, heavy, api, ORIN, None)["TensorRT"]
    assert check.state == state and words in check.found


def test_an_older_version_than_any_release(monkeypatch, heavy):
    trt = find_tensorrt(install(monkeypatch, make_trt("tensorrt-10.3", 87, "10.0.1")).__name__)
    lines = preflight(heavy, "vision", trt, TARGETS["jetson-orin"], BuildOptions(), None, None)
    check = next(line for line in lines if line.name == "TensorRT")
    assert check.state == "warning" and "older TensorRT" in check.advice


@pytest.mark.parametrize(("power", "state"), [("MAXN_SUPER", "ok"), ("15W", "warning"), (None, "unknown")])
def test_the_power_mode(monkeypatch, heavy, power, state):
    check = checks(monkeypatch, heavy, "tensorrt-10.3", ORIN, None, power=power)["power mode"]
    assert check.state == state and ("nvpmodel" in check.advice) == (state == "warning")


def test_a_workspace_below_the_least_is_refused(heavy):
    check_workspace(heavy, "vision", BuildOptions())
    check_workspace(heavy, "vision", BuildOptions(workspace=4 << 20))
    check_workspace(heavy, "decoder", BuildOptions(workspace=4 << 20, batch=(1, 1, 8)))
    words = r"is 1 MiB and the vision engine needs at least 4 MiB: give 0\.004 GiB or more, or leave it out"
    with pytest.raises(UserError, match=words):
        check_workspace(heavy, "vision", BuildOptions(workspace=1 << 20))
    with pytest.raises(UserError, match="at least 32 MiB, 4 MiB for each of 8 pictures"):
        check_workspace(heavy, "vision", BuildOptions(workspace=16 << 20, batch=(1, 1, 8)))
    engine = dataclasses.replace(heavy.manifest.decoder.engine, cache=10**5)
    decoder = dataclasses.replace(heavy.manifest.decoder, engine=engine)
    longer = dataclasses.replace(heavy, manifest=dataclasses.replace(heavy.manifest, decoder=decoder))
    with pytest.raises(UserError, match="the decoder engine needs at least 146 MiB for a cache of 100,000 rows"):
        check_workspace(longer, "decoder", BuildOptions(workspace=100 << 20))
