"""The decoder backends ``tensorrt`` and ``tensorrt_rtx``, on fakes that compute: a static cache, updated in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_engines
from fake_cuda import FakeCuda

from svdprune.runtime import BundleError, NumericalError, UserError, open_bundle
from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.decoder import open_decoder
from svdprune.runtime.decoder.tensorrt import EngineDecoder

SPLITS = [[12], [1] * 12, [7, 1, 1, 3], [4, 8]]
Opener = Callable[..., EngineDecoder]


def rows(count: int, seed: int = 0, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings float32 [count, H]; positions with gaps where ``stride`` allows."""
    random = np.random.default_rng(seed)
    positions = np.cumsum(random.integers(1, stride + 1, count)) - 1
    return random.normal(size=(count, tiny.HIDDEN)).astype(np.float32), positions.astype(np.int64)


def upload(decoder: EngineDecoder, cuda: FakeCuda, array: np.ndarray) -> DeviceArray:
    memory = decoder.device.malloc(array.nbytes, "rows")
    cuda.view(memory.pointer, array.nbytes)[:] = array.view(np.uint8).ravel()
    return DeviceArray(memory, array.shape, array.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engines.engine_bundle(tmp_path_factory.mktemp("decoder") / "bundle")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    return tiny_engines.machine(monkeypatch, getattr(request, "param", "tensorrt-10.3"))[0]


@pytest.fixture
def opened(cuda: FakeCuda, folder: Path) -> EngineDecoder:
    tiny_engines.build(folder, "decoder")
    decoder = open_decoder("tensorrt", open_bundle(folder))
    assert isinstance(decoder, EngineDecoder)
    return decoder


@pytest.mark.parametrize("api", tiny_engines.APIS)
@pytest.mark.parametrize("stride", [1, 9])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_logits_are_the_reference_s(
    api: str, stride: int, split: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, trt = tiny_engines.machine(monkeypatch, api)
    tiny_engines.build(folder, "decoder", trt.__name__)
    decoder = open_decoder(trt.__name__, open_bundle(folder))
    state = decoder.start()
    embeds, positions = rows(12, stride=stride)
    done = 0
    for count in split:
        logits = state.append(embeds[done : done + count], positions[done : done + count])
        done += count
        assert state.length == done
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, tiny.reference_logits(embeds[:done], positions[:done]), atol=2e-4)
    decoder.close()
    assert (fake.held, len(fake.pinned), fake._streams) == (0, 0, set())


def test_a_step_is_one_graph_and_allocates_nothing(opened: EngineDecoder, cuda: FakeCuda) -> None:
    state = opened.start()
    embeds, positions = rows(40)
    state.append(embeds[:20], positions[:20])
    allocated = cuda.calls["cudaMalloc"], cuda.calls["cudaMallocHost"]
    for count in range(20, 40):
        logits = state.append(embeds[count : count + 1], positions[count : count + 1])
    np.testing.assert_allclose(logits, tiny.reference_logits(embeds, positions), atol=2e-4)
    assert (cuda.calls["cudaMalloc"], cuda.calls["cudaMallocHost"]) == allocated
    assert (cuda.calls["cudaGraphInstantiate"], cuda.launches) == (1, 19)
    state.append(embeds[:20], positions[:20])  # another prompt does not spoil the graph
    state.append(embeds[20:21], positions[20:21])
    assert (cuda.calls["cudaGraphInstantiate"], cuda.launches) == (1, 20)


def test_a_step_moves_one_row_in_and_its_logits_out(opened: EngineDecoder, cuda: FakeCuda) -> None:
    state = opened.start()
    embeds, positions = rows(3)
    state.append(embeds[:2], positions[:2])
    cuda.copies.clear()
    state.append(embeds[2:], positions[2:])
    assert cuda.copies == {"HostToDevice": tiny.HIDDEN * 4 + 8 + 8, "DeviceToHost": tiny.VOCAB * 4}


def test_truncate_forgets(opened: EngineDecoder) -> None:
    state = opened.start()
    embeds, positions = rows(10)
    other, _ = rows(10, seed=1)
    state.append(embeds, positions)
    for kept in (6, 0):
        state.truncate(kept)
        assert state.length == kept
        logits = state.append(other[kept:8], positions[kept:8])
        wanted = tiny.reference_logits(np.concatenate([embeds[:kept], other[kept:8]]), positions[:8])
        np.testing.assert_allclose(logits, wanted, atol=2e-4)
    for wrong in (9, -1):
        with pytest.raises(ValueError, match=f"cannot cut a cache of 8 rows to {wrong}"):
            state.truncate(wrong)


def test_a_prompt_longer_than_one_run_takes_several(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_engines.build(folder, "decoder", rows=8)
    decoder: Any = open_decoder("tensorrt", open_bundle(folder))
    assert (decoder.most, decoder.capacity) == (8, tiny_engines.CACHE)
    embeds, positions = rows(21)
    features = upload(decoder, cuda, embeds[5:18])
    wanted = tiny.reference_logits(embeds, positions)
    np.testing.assert_allclose(decoder.start().append(embeds, positions), wanted, atol=2e-4)
    cuda.copies.clear()
    pieces = [embeds[:5], features, embeds[18:]]
    np.testing.assert_allclose(decoder.start().append(pieces, positions), wanted, atol=2e-4)
    assert cuda.copies["DeviceToDevice"] == features.nbytes
    assert cuda.copies["DeviceToHost"] == 3 * tiny.VOCAB * 4


def test_states_are_apart(opened: EngineDecoder) -> None:
    first, second = opened.start(), opened.start()
    embeds, positions = rows(8)
    other, _ = rows(8, seed=1)
    for count in range(8):
        ours = first.append(embeds[count : count + 1], positions[count : count + 1])
        theirs = second.append(other[count : count + 1], positions[count : count + 1])
    np.testing.assert_allclose(ours, tiny.reference_logits(embeds, positions), atol=2e-4)
    np.testing.assert_allclose(theirs, tiny.reference_logits(other, positions), atol=2e-4)


def test_a_state_nobody_uses_leaves_its_cache_to_the_next(opened: EngineDecoder, cuda: FakeCuda) -> None:
    embeds, positions = rows(8)
    wanted = tiny.reference_logits(embeds, positions)
    state = opened.start()
    state.append(embeds, positions)
    one = cuda.held
    for seed in range(3):  # started while the one before lives, as in `chat = vlm.chat(...)`, which then goes
        state = opened.start()
        state.append(*rows(12, seed=seed + 5))
        state.truncate(0)
        np.testing.assert_allclose(state.append(embeds, positions), wanted, atol=2e-4)
    assert cuda.held == one
    other = opened.start()
    other.append(embeds, positions)
    two = cuda.held
    assert two - one == 2 * tiny.LAYERS * tiny.KV_HEADS * tiny_engines.CACHE * tiny.HEAD_DIM * 4
    ring: list[Any] = [other]
    ring.append(ring)  # as a chat whose stream was left unread
    del other, ring
    opened.start().append(embeds, positions)
    assert cuda.held == two


def test_the_cache_is_full(opened: EngineDecoder) -> None:
    state = opened.start()
    state.append(*rows(tiny_engines.CACHE - 1))
    with pytest.raises(UserError, match=r"cache holds 96 rows, 95 are taken and 2 more are wanted: ask a shorter"):
        state.append(*rows(2))
    state.append(*rows(1))
    with pytest.raises(UserError, match=r"96 are taken and 1 more"):
        state.append(*rows(1))
    assert state.length == tiny_engines.CACHE


def test_no_memory_for_the_cache(opened: EngineDecoder, cuda: FakeCuda) -> None:
    cuda.total = cuda.held + 1000
    with pytest.raises(UserError, match=r"the KV cache of 96 rows needs 0 MB of memory and 0 MB of 0 MB are free"):
        opened.start().append(*rows(1))


def test_rows_that_do_not_fit(opened: EngineDecoder) -> None:
    state = opened.start()
    for embeds, positions in (
        (np.zeros((0, tiny.HIDDEN), np.float32), np.zeros(0, np.int64)),
        (np.zeros((2, 5), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, tiny.HIDDEN), np.float32), np.zeros(3, np.int64)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            state.append(embeds, positions)
    with pytest.raises(ValueError, match="do not fit"):
        state.append([np.zeros((2, tiny.HIDDEN), np.float32), np.zeros((2, 5), np.float32)], np.zeros(4, np.int64))


def test_nan_is_told_and_leaves_the_state_usable(cuda: FakeCuda, tmp_path: Path) -> None:
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    tiny_engines.build(path, "decoder")
    decoder: Any = open_decoder("tensorrt", open_bundle(path))
    state = decoder.start()
    embeds, positions = rows(10)
    state.append(embeds[:4], positions[:4])
    bad = embeds[4:].copy()
    bad[2] = np.nan
    with pytest.raises(NumericalError, match="decoder gave NaN"):
        state.append(bad, positions[4:])
    with pytest.raises(NumericalError, match=r"vision encoder gave 32 of 64 features as NaN or infinity"):
        state.append([embeds[4:6], upload(decoder, cuda, bad[2:4]), embeds[8:]], positions[4:])
    assert state.length == 4
    logits = state.append(embeds[4:], positions[4:])
    np.testing.assert_allclose(logits, tiny.reference_logits(embeds, positions), atol=2e-4)


def test_a_bundle_without_a_graph_for_engines(bundle: Path, tmp_path: Path, cuda: FakeCuda) -> None:
    with pytest.raises(UserError, match=r"has no decoder graph for engines \(it was exported without one\): use the"):
        open_decoder("tensorrt", open_bundle(bundle))
    path = tiny.make_bundle(tmp_path / "old", decoder={"engine_refused": "TensorRT 10.3 lacks Attention"})
    with pytest.raises(UserError, match=r"\(TensorRT 10.3 lacks Attention\): use the decoder backend `onnxruntime`"):
        open_decoder("tensorrt_rtx", open_bundle(path))
    with pytest.raises(UserError, match="leave out checkpoint="):
        open_decoder("tensorrt", open_bundle(bundle), checkpoint="folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 3}, r"has no tensor present\.2\.key"),
        ({"layers": 1}, r"has past\.1\.key, which is not known"),
        ({"vocab": 9}, r"has logits \[1, 1, \d+\], the manifest says \[1, 1, 9\]"),
        ({"kv_heads": 4}, r"has past\.0\.key \[1, 2, 96, 8\], the manifest says \[1, 4, 96, 8\]"),
    ],
)
def test_a_manifest_that_says_otherwise(change: dict[str, Any], words: str, tmp_path: Path, cuda: FakeCuda) -> None:
    path = tiny_engines.engine_bundle(tmp_path / "bundle", decoder=change)
    tiny_engines.build(path, "decoder")
    with pytest.raises(BundleError, match=words):
        open_decoder("tensorrt", open_bundle(path))
    assert (cuda.held, cuda._streams) == (0, set())
