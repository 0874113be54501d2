"""An engine that runs: ONNX Runtime's numbers, buffers allocated once, graphs captured once, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_engines
from fake_cuda import FakeCuda
from fake_trt import run_onnx

from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.lane import EngineFault
from svdprune.runtime.engines.session import EngineSession, Pieces
from svdprune.runtime.errors import BundleError, UserError

Opener = Callable[..., EngineSession]
ALIAS = {f"present.{i}.{part}": f"past.{i}.{part}" for i in range(tiny.LAYERS) for part in ("key", "value")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engines.engine_bundle(tmp_path_factory.mktemp("session") / "bundle")


@pytest.fixture(params=tiny_engines.APIS)
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, api: str) -> tuple[FakeCuda, Any]:
    return tiny_engines.machine(monkeypatch, api)


@pytest.fixture
def open_session(fakes: tuple[FakeCuda, Any], folder: Path) -> Iterator[Opener]:
    """Open an engine of the part; closed at the end, when nothing may be left."""
    cuda, trt = fakes
    opened: list[EngineSession] = []

    def open_part(part: str, batch: int = 2, alike: bool = True, **options: Any) -> EngineSession:
        data = tiny_engines.build(folder, part, trt.__name__, batch=batch, alike=alike).path.read_bytes()
        alias = ALIAS if part == "decoder" else None
        opened.append(EngineSession(find_tensorrt(trt.__name__), data, Device(), part, alias=alias, **options))
        return opened[-1]

    yield open_part
    for session in opened:
        session.close()
        session.close()
    assert (cuda.held, len(cuda.pinned)) == (0, 0)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, tiny.SIDE, tiny.SIDE, 3), np.uint8)


def wanted(folder: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return run_onnx((folder / "vision.onnx").read_bytes(), {"pixels": pixels})


def test_outputs_are_onnx_runtime_s_and_buffers_are_allocated_once(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    cuda, session = fakes[0], open_session("vision")
    assert session.largest["features"] == (2, tiny.KEEP, tiny.HIDDEN)
    allocated = cuda.calls["cudaMalloc"]
    assert allocated == 5  # activations, pixels, features, kept_indices, scores
    for seed in range(3):
        for batch in (1, 2):
            pixels = pictures(batch, seed)
            outputs = session.run({"pixels": pixels}, repeats=True)
            for name, array in wanted(folder, pixels).items():
                np.testing.assert_array_equal(outputs[name], array, strict=True)
    assert cuda.calls["cudaMalloc"] == allocated
    assert cuda.calls["cudaMallocHost"] == 4


def test_outputs_are_the_caller_s_own(open_session: Opener) -> None:
    session = open_session("vision")
    first = session.run({"pixels": pictures(1)})["features"]
    assert isinstance(first, np.ndarray)
    kept = first.copy()
    session.run({"pixels": pictures(1, seed=1)})
    np.testing.assert_array_equal(first, kept)


def test_a_graph_is_captured_after_one_warm_up_and_used_from_then_on(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    (cuda, trt), session = fakes, open_session("vision")
    for run in range(1, 6):
        pixels = pictures(1, seed=run)
        outputs = session.run({"pixels": pixels}, repeats=True)
        np.testing.assert_array_equal(outputs["features"], wanted(folder, pixels)["features"])
        assert cuda.launches == max(0, run - 1)
    assert len(trt.fake.called("execute_async_v3")) == 2  # the warm-up and the capture
    assert cuda.calls["cudaGraphInstantiate"] == 1
    session.run({"pixels": pictures(2)}, repeats=True)  # other shapes have a context and a graph of their own
    session.run({"pixels": pictures(2)}, repeats=True)
    session.run({"pixels": pictures(1)}, repeats=True)
    assert cuda.calls["cudaGraphInstantiate"] == 2
    assert cuda.launches == 6
    assert sorted(session.graphs.values())[:2] == ["captured", "captured"]


def test_shapes_that_do_not_come_again_are_not_captured(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    session = open_session("vision")
    for _ in range(3):
        session.run({"pixels": pictures(1)})
    assert fakes[0].calls["cudaStreamBeginCapture"] == 0
    assert session.graphs == {"profile 0": "its shapes vary"}


def test_only_the_first_few_shapes_keep_a_graph(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    session = open_session("vision", batch=6)
    for _ in range(3):
        for batch in range(1, 7):
            outputs = session.run({"pixels": pictures(batch)}, repeats=True)
            np.testing.assert_array_equal(outputs["scores"], wanted(folder, pictures(batch))["scores"])
    assert list(session.graphs.values()).count("captured") == 4


def test_a_capture_that_is_refused_costs_no_answer(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    cuda, session = fakes[0], open_session("vision")
    cuda.refuse_capture = True
    for seed in range(3):
        pixels = pictures(1, seed)
        outputs = session.run({"pixels": pixels}, repeats=True)
        np.testing.assert_array_equal(outputs["features"], wanted(folder, pixels)["features"])
    assert cuda.calls["cudaStreamBeginCapture"] == 1  # not tried again
    assert any("CUDA error 900" in told for told in session.graphs.values())


def test_contexts_share_the_memory_of_their_activations(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    trt = fakes[1]
    session = open_session("vision")
    session.run({"pixels": pictures(1)}, repeats=True)
    made = trt.fake.called("create_execution_context")
    assert [strategy for strategy, _ in made] == ["USER_MANAGED"] * 2
    if trt.__name__ == "tensorrt_rtx":  # kernels for the repeated shapes are compiled before they are captured
        chosen = [getattr(config, "dynamic_shapes_kernel_specialization_strategy", None) for _, config in made]
        assert chosen[1] == trt.DynamicShapesKernelSpecializationStrategy.EAGER
        assert chosen[0] != chosen[1]


def test_tensorrt_rtx_may_say_that_it_cannot_be_captured(
    open_session: Opener, fakes: tuple[FakeCuda, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, trt = fakes
    if not hasattr(trt.IExecutionContext, "is_stream_capturable"):
        pytest.skip("only TensorRT-RTX tells")
    monkeypatch.setattr(trt.IExecutionContext, "is_stream_capturable", lambda self, stream: False)
    session = open_session("vision")
    for _ in range(3):
        session.run({"pixels": pictures(1)}, repeats=True)
    assert cuda.calls["cudaStreamBeginCapture"] == 0
    assert "TensorRT says that its context cannot be captured" in session.graphs.values()


def test_outputs_left_on_the_device_stay_what_they_were(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    cuda, session = fakes[0], open_session("vision")
    allocated = cuda.calls["cudaMalloc"]
    first = session.run({"pixels": pictures(1)}, on_device=("features",), repeats=True)["features"]
    assert isinstance(first, DeviceArray)
    assert cuda.copies["DeviceToHost"] == tiny.KEEP * 8 + tiny.TOKENS * 4  # kept_indices and scores
    second = session.run({"pixels": pictures(1, seed=1)}, on_device=("features",), repeats=True)["features"]
    assert isinstance(second, DeviceArray)
    assert cuda.calls["cudaMalloc"] == allocated + 1  # the first was set aside, the graph's addresses are as before
    third = session.run({"pixels": pictures(1, seed=2)}, on_device=("features",), repeats=True)["features"]
    assert cuda.launches == 2
    for seed, array in enumerate((first, second, third)):
        assert isinstance(array, DeviceArray)
        np.testing.assert_array_equal(array.host(), wanted(folder, pictures(1, seed))["features"])
    held = cuda.held
    del first, second, third, array
    gc.collect()
    assert cuda.held < held


def test_an_output_nobody_holds_is_not_set_aside(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    cuda, session = fakes[0], open_session("vision")
    allocated = cuda.calls["cudaMalloc"]
    for seed in range(3):
        session.run({"pixels": pictures(1, seed)}, on_device=("features",))
    assert (cuda.calls["cudaMalloc"], cuda.copies["DeviceToDevice"]) == (allocated, 0)


def test_after_close_what_was_left_on_the_device_is_gone(open_session: Opener) -> None:
    session = open_session("vision")
    features = session.run({"pixels": pictures(1)}, on_device=("features",))["features"]
    session.close()
    assert isinstance(features, DeviceArray)
    with pytest.raises(UserError, match=r"was closed: copy it to the host"):
        features.host()


def decoder_feeds(rows: np.ndarray, start: int) -> dict[str, Any]:
    return {
        "inputs_embeds": rows[None],
        "position_ids": np.arange(start, start + len(rows), dtype=np.int64)[None],
        "write_index": np.array([start], np.int64),
    }


def test_tensors_updated_in_place(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    cuda, session = fakes[0], open_session("decoder")
    caches = [session.allocate(ALIAS.values(), "the KV cache") for _ in range(2)]
    assert all((array.host() == 0).all() and array.pointer % 256 == 0 for array in caches[0].values())
    rows = np.random.default_rng(0).normal(size=(9, tiny.HIDDEN)).astype(np.float32)
    for cache in caches:
        session.run(decoder_feeds(rows[:5], 0), in_place=cache)
    for count in range(5, 9):
        for cache in caches:  # other addresses: the graph of the last run is of no use
            logits = session.run(decoder_feeds(rows[count : count + 1], count), in_place=cache, repeats=True)["logits"]
            np.testing.assert_allclose(
                np.ravel(logits),
                tiny.reference_logits(rows[: count + 1], np.arange(count + 1)),
                atol=2e-4,  # type: ignore[arg-type]
            )
    assert cuda.launches == 0
    for count in range(4):
        session.run(decoder_feeds(rows[-1:], 8), in_place=caches[0], repeats=True)
        assert cuda.launches == count  # the first run after a change of addresses warms up
    np.testing.assert_array_equal(caches[0]["past.1.key"].host(), caches[1]["past.1.key"].host())


@pytest.mark.parametrize("alike", [True, False])
def test_the_profile_that_is_tuned_for_a_shape_is_taken(
    open_session: Opener, fakes: tuple[FakeCuda, Any], alike: bool
) -> None:
    profiles: list[int] = []
    trt = fakes[1]
    execute = trt.fake.execute
    trt.fake.execute = lambda execution: profiles.append(execution.profile) or execute(execution)
    session = open_session("decoder", alike=alike)
    cache = session.allocate(ALIAS.values(), "the KV cache")
    rows = np.zeros((3, tiny.HIDDEN), np.float32)
    session.run(decoder_feeds(rows, 0), in_place=cache)
    session.run(decoder_feeds(rows[:1], 3), in_place=cache, repeats=True)
    assert profiles == [0, 1]


def test_an_input_in_pieces_from_both_memories(open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path) -> None:
    cuda, session = fakes[0], open_session("vision")
    pixels = pictures(2)
    memory = session.device.malloc(pixels[1].nbytes, "a picture")
    cuda.view(memory.pointer, pixels[1].nbytes)[:] = pixels[1].ravel()
    there = DeviceArray(memory, pixels[1].shape, pixels.dtype)
    outputs = session.run({"pixels": Pieces(pixels.shape, [pixels[0], there])})
    np.testing.assert_array_equal(outputs["features"], wanted(folder, pixels)["features"])
    memory.free()


def test_what_does_not_fit_is_refused(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    session = open_session("vision")
    with pytest.raises(
        UserError, match=r"vision was built for at most pixels \[2, 28, 28, 3\], not for pixels \[3, 28"
    ):
        session.run({"pixels": pictures(3)})
    with pytest.raises(ValueError, match=r"takes \['pixels'\], not \['image'\]"):
        session.run({"image": pictures(1)})
    with pytest.raises(ValueError, match="pixels is uint8, not float32"):
        session.run({"pixels": pictures(1).astype(np.float32)})
    data = session._engine.serialize()
    with pytest.raises(BundleError, match=r"has no tensor present\.0\.key"):
        EngineSession(find_tensorrt(fakes[1].__name__), data, session.device, "vision", alias=ALIAS)


def test_shapes_may_be_capped_to_save_memory(open_session: Opener, fakes: tuple[FakeCuda, Any]) -> None:
    session = open_session("vision", shapes={"pixels": (1, tiny.SIDE, tiny.SIDE, 3)})
    assert session.largest["scores"] == (1, tiny.TOKENS)
    session.run({"pixels": pictures(1)})
    with pytest.raises(UserError, match=r"at most pixels \[1, 28, 28, 3\]"):
        session.run({"pixels": pictures(2)})


def test_a_run_that_tensorrt_refuses(open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path) -> None:
    trt = fakes[1]
    session = open_session("vision")
    execute, trt.fake.execute = trt.fake.execute, lambda execution: False
    with pytest.raises(EngineFault, match=r"vision cannot run: TensorRT gave no reason; build it again"):
        session.run({"pixels": pictures(1)})
    session._contexts._log("ERROR", "executeMyelinGraph: CUDA error 700: an illegal memory access was encountered")
    with pytest.raises(EngineFault, match=r"vision cannot run: a kernel read outside its memory"):
        session.run({"pixels": pictures(1)})
    trt.fake.execute = execute
    np.testing.assert_array_equal(
        session.run({"pixels": pictures(1)})["features"], wanted(folder, pictures(1))["features"]
    )


def test_an_interrupted_run_leaves_the_next_one_right(
    open_session: Opener, fakes: tuple[FakeCuda, Any], folder: Path
) -> None:
    trt = fakes[1]
    session = open_session("vision")
    execute = trt.fake.execute

    def interrupt(execution: Any) -> bool:
        execute(execution)
        raise KeyboardInterrupt

    trt.fake.execute = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.run({"pixels": pictures(1)})
    trt.fake.execute = execute
    outputs = session.run({"pixels": pictures(1, seed=1)})
    np.testing.assert_array_equal(outputs["features"], wanted(folder, pictures(1, seed=1))["features"])


def test_memory_that_is_short_leaves_nothing_behind(fakes: tuple[FakeCuda, Any], folder: Path) -> None:
    cuda, trt = fakes
    data = tiny_engines.build(folder, "vision", trt.__name__).path.read_bytes()
    device = Device()
    cuda.total = 4000
    with (
        pytest.raises(UserError, match=r"vision \(its pixels\) needs"),
        EngineSession(find_tensorrt(trt.__name__), data, device, "vision"),
    ):
        pass
    assert cuda.held == 0
