"""Decoder backends at the seam: the ONNX graph with either cache, and transformers, against full references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from svdprune.runtime import BundleError, MissingDependency, UserError, load, open_bundle
from svdprune.runtime.decoder import open_decoder
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.decoder.kv_cache import SharedCache

SPLITS = [[12], [1] * 12, [7, 1, 1, 3], [4, 8]]
Rows = Callable[[int], tuple[np.ndarray, np.ndarray]]


def rows(count: int, seed: int = 0, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings float32 [count, H]; positions with gaps where ``stride`` allows."""
    random = np.random.default_rng(seed)
    positions = np.cumsum(random.integers(1, stride + 1, count)) - 1
    return random.normal(size=(count, tiny.HIDDEN)).astype(np.float32), positions.astype(np.int64)


@pytest.mark.parametrize("cache", ["bundle", "shared_bundle"])
@pytest.mark.parametrize("stride", [1, 9])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_logits_are_the_reference_s(cache: str, stride: int, split: list[int], request: pytest.FixtureRequest) -> None:
    state = open_decoder("onnxruntime", open_bundle(request.getfixturevalue(cache)), 1).start()
    embeds, positions = rows(12, stride=stride)
    done = 0
    for count in split:
        logits = state.append(embeds[done : done + count], positions[done : done + count])
        done += count
        assert state.length == done
        np.testing.assert_allclose(logits, tiny.reference_logits(embeds[:done], positions[:done]), atol=2e-4)


@pytest.mark.parametrize("cache", ["bundle", "shared_bundle"])
def test_truncate_forgets(cache: str, request: pytest.FixtureRequest) -> None:
    state = open_decoder("onnxruntime", open_bundle(request.getfixturevalue(cache)), 1).start()
    embeds, positions = rows(10)
    other, _ = rows(10, seed=1)
    state.append(embeds, positions)
    for kept in (6, 0):
        state.truncate(kept)
        assert state.length == kept
        logits = state.append(other[kept:8], positions[kept:8])
        wanted = tiny.reference_logits(np.concatenate([embeds[:kept], other[kept:8]]), positions[:8])
        np.testing.assert_allclose(logits, wanted, atol=2e-4)
    with pytest.raises(ValueError, match="cannot cut a cache of 8 rows to 9"):
        state.truncate(9)


def test_states_are_apart(shared_bundle: Path) -> None:
    decoder = open_decoder("onnxruntime", open_bundle(shared_bundle), 1)
    first, second = decoder.start(), decoder.start()
    embeds, positions = rows(6)
    other, _ = rows(6, seed=1)
    first.append(embeds[:5], positions[:5])
    second.append(other, positions)
    wanted = tiny.reference_logits(embeds, positions)
    np.testing.assert_allclose(first.append(embeds[5:], positions[5:]), wanted, atol=2e-4)


def test_a_shared_buffer_grows_to_the_context(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdprune.runtime.decoder.kv_cache._FIRST_CAPACITY", 4)
    state: Any = open_decoder("onnxruntime", open_bundle(shared_bundle), 1).start()
    embeds, positions = rows(40)
    for index in range(40):
        logits = state.append(embeds[index : index + 1], positions[index : index + 1])
    np.testing.assert_allclose(logits, tiny.reference_logits(embeds, positions), atol=2e-4)
    cache = state._cache
    assert isinstance(cache, SharedCache)
    assert cache._capacity == 64
    state.append(*rows(tiny.CONTEXT - 40))
    assert cache._capacity == tiny.CONTEXT


def test_rows_that_do_not_fit(bundle: Path) -> None:
    state = open_decoder("onnxruntime", open_bundle(bundle), 1).start()
    for embeds, positions in (
        (np.zeros((0, tiny.HIDDEN), np.float32), np.zeros(0, np.int64)),
        (np.zeros((2, 5), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, tiny.HIDDEN), np.float32), np.zeros(3, np.int64)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            state.append(embeds, positions)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder/model.onnx"])
def test_a_graph_that_is_none(name: str, tmp_path: Path) -> None:
    path = tiny.make_bundle(tmp_path / "bundle")
    size = (path / name).stat().st_size
    (path / name).write_bytes((b"\x08\x09" * size)[:size])  # of the right size, so that only the graph is wrong
    with pytest.raises(BundleError, match=rf"{name} does not load in onnxruntime"):
        load(path, verify=False)


def test_embedding_reads_rows_in_float32(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float16)
    np.save(tmp_path / "table.npy", table)
    embedding = Embedding(tmp_path / "table.npy", 9, 4)
    assert embedding([2, 2, 8]).dtype == np.float32
    assert (embedding([2, 2, 8]) == table[[2, 2, 8]].astype(np.float32)).all()
    assert embedding([]).shape == (0, 4)
    for ids in ([9], [-1]):
        with pytest.raises(BundleError, match="is outside"):
            embedding(ids)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    for content, words in ((b"", "is not a table"), (b"text", "is not a table")):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=words):
            Embedding(path, 9, 4)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError, match="is not a table"):  # a pickle could run code: never loaded
        Embedding(path, 9, 4)
    np.save(path, np.zeros((9, 4), np.int64))
    with pytest.raises(BundleError, match="must be float16 or float32"):
        Embedding(path, 9, 4)


def test_transformers_missing_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"needs the package `torch`.*svdprune\[export\]") as caught:
        open_decoder("transformers", open_bundle(bundle), checkpoint="folder")
    assert (caught.value.package, caught.value.extra, caught.value.exit_code) == ("torch", "export", 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Llama of the tiny bundle's sizes, and its checkpoint."""
    reason = "the reference decoder needs torch and transformers"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=tiny.CONTEXT, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("stride", [1, 9])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_transformers_backend_is_one_forward(
    llama: tuple[Any, Path], bundle: Path, stride: int, split: list[int]
) -> None:
    import torch

    model, folder = llama
    state = open_decoder("transformers", open_bundle(bundle), 1, str(folder)).start()
    embeds, positions = rows(12, stride=stride)
    done = 0
    for count in split:
        logits = state.append(embeds[done : done + count], positions[done : done + count])
        done += count
    with torch.inference_mode():
        wanted = model(
            inputs_embeds=torch.tensor(embeds)[None],
            position_ids=torch.tensor(positions)[None],
            attention_mask=torch.ones((1, 12), dtype=torch.int64),
            use_cache=False,
        ).logits[0, -1]
    np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-4)
    state.truncate(5)
    assert state.length == 5
    again = state.append(embeds[5:], positions[5:])
    np.testing.assert_allclose(again, wanted.numpy(), atol=1e-4)
    state.truncate(0)
    assert state.length == 0


def test_transformers_backend_answers(llama: tuple[Any, Path], bundle: Path) -> None:
    vlm = load(bundle, decoder="transformers", checkpoint=str(llama[1]), threads=1)
    chat = vlm.chat(tiny.picture())
    first = chat.ask("What?", max_new_tokens=5)
    assert first.token_ids == vlm.ask(chat.sight, "What?", max_new_tokens=5).token_ids
    assert chat.ask("And?", max_new_tokens=5).tokens.generated


def test_transformers_backend_refuses_other_checkpoints(llama: tuple[Any, Path], bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load(bundle, decoder="transformers", checkpoint=str(tmp_path))
    other = tiny.make_bundle(tmp_path / "other", decoder={"vocab": 77})
    with pytest.raises(UserError, match=r"vocabulary \d+, the bundle 32 and 77"):
        open_decoder("transformers", open_bundle(other), 1, str(llama[1]))
