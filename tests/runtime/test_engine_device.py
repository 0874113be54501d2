"""CUDA through the binding: the names that exist, a machine without a GPU, memory given and taken back."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Error, FakeCuda, install
from fake_trt import uninstall

from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.engines.device import CudaError, Device, NoGpu
from svdprune.runtime.errors import MissingDependency, UserError

ENGINES = Path(sys.modules[Device.__module__].__file__ or "").parent


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch, FakeCuda())


def real_binding() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")


def test_every_name_of_cuda_that_the_runtime_uses_exists() -> None:
    real = real_binding()
    text = "\n".join(place.read_text(encoding="utf-8") for place in ENGINES.glob("*.py"))
    used = {
        *re.findall(r'call\(\s*"(cuda\w+)"', text),
        *re.findall(r"_cuda\.(cuda\w+)", text),
        *re.findall(r'"(cuda[A-Z]\w+)", "cuda', text),
    }
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphInstantiate", "cudaStreamNonBlocking"} <= used
    assert not [name for name in sorted(used) if not hasattr(real, name)]


def test_the_fake_is_made_of_real_names_and_numbers() -> None:
    real = real_binding()
    names = [name for name in vars(FakeCuda) if name.startswith("cuda") and name != "cudaSuccess"]
    assert not [name for name in names if not hasattr(real, name)]
    for ours, theirs in (
        (Error, real.cudaError_t),
        (FakeCuda.cudaMemcpyKind, real.cudaMemcpyKind),
        (FakeCuda.cudaDeviceAttr, real.cudaDeviceAttr),
        (FakeCuda.cudaStreamCaptureMode, real.cudaStreamCaptureMode),
    ):
        assert {item.name: int(item) for item in ours} == {item.name: int(getattr(theirs, item.name)) for item in ours}
    assert (FakeCuda.cudaStreamNonBlocking, FakeCuda.cudaEventDefault) == (
        int(real.cudaStreamNonBlocking),
        int(real.cudaEventDefault),
    )


def test_the_real_binding_without_a_gpu() -> None:
    if int(real_binding().cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoGpu, match=r"CUDA error 35|CUDA error 100|no GPU"):
        Device()


@pytest.mark.parametrize(
    ("error", "words"),
    [(Error.cudaErrorInsufficientDriver, "CUDA error 35"), (Error.cudaErrorNoDevice, "CUDA error 100")],
)
def test_no_driver_and_no_device(cuda: FakeCuda, error: Error, words: str) -> None:
    cuda.broken = error
    with pytest.raises(NoGpu, match=words) as caught:
        Device()
    assert caught.value.exit_code == 2


def test_no_gpu_without_an_error(cuda: FakeCuda) -> None:
    cuda.devices = 0
    with pytest.raises(NoGpu, match=r"no GPU that CUDA can use .*use the backend `onnxruntime`"):
        Device()


def test_a_driver_library_that_is_missing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", absent)
    with pytest.raises(NoGpu, match=r"Failed to dlopen libcuda.so.1"):
        Device()


@pytest.mark.parametrize("extra", ["tensorrt", "rtx"])
def test_the_binding_is_missing(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "cuda")
    with pytest.raises(MissingDependency, match=rf"running an engine needs .*svdprune\[{extra}\]"):
        Device(extra)


def test_what_a_device_is(cuda: FakeCuda) -> None:
    device = Device()
    assert (device.name, device.sm, device.integrated) == ("Fake GPU", 87, True)
    assert device.memory() == (1 << 30, 1 << 30)
    cuda.sm = 120
    other = Device()
    assert (other.sm, other.integrated) == (120, False)
    device.close()
    device.close()


def test_memory_is_given_back_once(cuda: FakeCuda) -> None:
    device = Device()
    one, two = device.malloc(1000, "a thing"), device.pinned(10, "another")
    assert device.memory()[0] == (1 << 30) - 1000
    one.free()
    one.free()
    with pytest.raises(UserError, match="was closed"):
        _ = one.pointer
    del two  # with the object
    assert (cuda.held, len(cuda.pinned)) == (0, 0)


def test_too_little_memory_is_told_in_numbers(cuda: FakeCuda) -> None:
    device = Device()
    cuda.total = 50_000_000
    kept = device.malloc(20_000_000, "the weights")
    with pytest.raises(UserError, match=r"the KV cache needs 40 MB of memory and 30 MB of 50 MB are free on Fake GPU"):
        device.malloc(40_000_000, "the KV cache")
    assert cuda.held == kept.nbytes


def test_copies_there_and_back(cuda: FakeCuda) -> None:
    device = Device()
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    stage, memory, copy = (make(96, "x") for make in (device.pinned, device.malloc, device.malloc))
    stage.array((24,), values.dtype)[:] = values.ravel()
    device.upload(memory.pointer, stage.pointer, 96)
    device.copy(copy.pointer, memory.pointer, 96)
    array = DeviceArray(copy, (2, 3, 4), values.dtype)
    assert (len(array), array.nbytes, array[1].shape) == (2, 96, (3, 4))
    np.testing.assert_array_equal(array.host(), values)
    np.testing.assert_array_equal(array[1].part(1, 3).host(), values[1, 1:3])
    device.clear_rows(copy.pointer + 4, 16, 8, 6)
    np.testing.assert_array_equal(array.host()[..., 1:3], 0)
    np.testing.assert_array_equal(array.host()[..., [0, 3]], values[..., [0, 3]])
    for wrong in (lambda: array[2], lambda: array.part(1, 1), lambda: array.part(0, 3)):
        with pytest.raises(IndexError):
            wrong()


def test_a_fault_on_the_gpu_is_told_once(cuda: FakeCuda) -> None:
    device = Device()
    cuda.fail_next = Error.cudaErrorIllegalAddress
    with pytest.raises(CudaError, match="CUDA error 700") as caught:
        device.synchronize()
    assert (caught.value.code, caught.value.exit_code) == (700, 1)
    device.synchronize()


def test_a_graph_runs_when_it_is_launched(cuda: FakeCuda) -> None:
    device = Device()
    memory = device.malloc(4, "x")
    graph = device.capture(lambda: device.clear(memory.pointer, 4))
    device.synchronize()
    assert cuda.view(memory.pointer, 4).tolist() == [255] * 4
    graph.launch()
    device.synchronize()
    assert cuda.view(memory.pointer, 4).tolist() == [0] * 4
    graph.free()
    graph.free()


@pytest.mark.parametrize("fails", ["the work", "the end"])
def test_a_capture_that_fails_leaves_the_stream_usable(cuda: FakeCuda, fails: str) -> None:
    device = Device()

    def work() -> None:
        if fails == "the work":
            raise CudaError(900, "not now")

    cuda.refuse_capture = fails == "the end"
    with pytest.raises(CudaError):
        device.capture(work)
    device.synchronize()
    assert cuda.calls["cudaGraphInstantiate"] == 0


def test_events_measure_the_stream(cuda: FakeCuda) -> None:
    device = Device()
    start = device.event()
    stop = device.event()
    assert stop.seconds_since(start) == pytest.approx(1e-3)  # the fake's clock: a millisecond an event
