"""The exported decoder against transformers: same logits and greedy tokens, with and without gaps in the positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.exporter.decoder_models import SIZES, TEXT, exported_greedy, load, make_model, prompt, reference_greedy


@pytest.mark.parametrize("name", TEXT)
def test_greedy_tokens_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(TEXT[name], tmp_path)
    session = load(tmp_path)
    table = np.load(tmp_path / "fp32" / "embed_tokens.npy", mmap_mode="r")
    for policy in ("compact", "original"):
        embeds, positions = prompt(model, policy)
        expected, logits = reference_greedy(model, embeds, positions, 24)
        tokens, ours = exported_greedy(session, table, embeds, positions, 24)
        assert tokens == expected
        np.testing.assert_allclose(ours, logits, atol=2e-4 * np.abs(logits).max())


def test_positions_matter(tmp_path: Path) -> None:
    """The check above could not fail if the graph ignored positions and the policies agreed by chance."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    session.start()
    compact = session.append(*(part.numpy() for part in prompt(model, "compact")))
    session.start()
    original = session.append(*(part.numpy() for part in prompt(model, "original")))
    assert np.abs(compact - original).max() > 0.05 * np.abs(compact).max()


def test_appending_in_pieces_equals_appending_at_once(tmp_path: Path) -> None:
    """A second question of a chat appends several rows to a cache that is not empty."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    session.start()
    once = session.append(embeds, positions)
    cache = session.cache
    session.start()
    for cut in ((0, 7), (7, 8), (8, len(embeds))):
        pieces = session.append(embeds[slice(*cut)], positions[slice(*cut)])
    np.testing.assert_allclose(pieces, once, atol=1e-4 * np.abs(once).max())
    for ours, theirs in zip(session.cache, cache, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_one_buffer_can_be_past_and_present(precision: str, tmp_path: Path) -> None:
    """What `kv_cache: shared` promises: a preallocated buffer, bound as both, is written in place."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path, precision)
    info = session.info
    assert info.kv_cache == "shared"
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    shape = (1, info.kv_heads, 64, info.head_dim)
    names = [f"{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
    garbage = np.random.default_rng(0).normal(size=shape).astype(np.float32)  # unused rows must not be read
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(garbage.copy()) for name in names}
    session.start()
    total = 0
    for cut in ((0, 10), (10, 11), (11, 12), (12, len(embeds))):
        rows, places = embeds[slice(*cut)], positions[slice(*cut)]
        expected = session.append(rows, places)
        total += len(rows)
        binding = session.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", rows[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", places[None])
        for name in names:
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffers[name])
            binding.bind_ortvalue_output(f"present.{name}", buffers[name])
        binding.bind_output("logits")
        session.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()[0, 0]  # in the order of binding
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    for name, grown in zip(names, session.cache, strict=True):
        buffer = buffers[name].numpy()
        np.testing.assert_allclose(buffer[:, :, :total], grown, atol=1e-4)
        np.testing.assert_array_equal(buffer[:, :, total:], garbage[:, :, total:])


def test_positions_beyond_the_context_are_refused(tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    session = load(tmp_path)
    session.start()
    one = np.zeros((1, SIZES["hidden_size"]), np.float32)
    session.append(one, np.array([session.info.context - 1]))
    session.start()
    with pytest.raises(Exception, match="position"):
        session.append(one, np.array([session.info.context]))
