"""The decoder engine's graph on ONNX Runtime against transformers: tokens, gaps in the positions, cache in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.static_export import export_engine_decoder
from svdprune.runtime.errors import UserError
from tests.exporter.decoder_models import SIZES, TEXT, make_model, prompt, reference_greedy
from tests.exporter.static_models import CACHE, greedy, load_static, pieces

STEPS = 24


def embedding_table(model: object) -> np.ndarray:
    table: np.ndarray = model.get_input_embeddings().weight.detach().numpy()  # type: ignore[attr-defined]
    return table


@pytest.mark.parametrize("name", TEXT)
def test_greedy_tokens_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(TEXT[name], tmp_path)
    session = load_static(tmp_path)
    for policy in ("compact", "original"):
        embeds, positions = prompt(model, policy)
        expected, logits = reference_greedy(model, embeds, positions, STEPS)
        tokens, ours = greedy(session, embedding_table(model), embeds.numpy(), positions.numpy(), STEPS)
        assert tokens == expected
        np.testing.assert_allclose(ours, logits, atol=2e-4 * np.abs(logits).max())


@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads", "mistral", "qwen2", "qwen3"])
def test_float16_follows_the_float32_model(name: str, tmp_path: Path) -> None:
    """ONNX Runtime has float16 kernels of these operators on a CPU: the very graph that engines are built from runs.

    Weights of the checkpoint are float16, so that only the arithmetic differs. The reference's tokens are fed, as a
    near tie may fall to the other side.
    """
    model = make_model(TEXT[name], tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.save_pretrained(tmp_path)
    session = load_static(tmp_path, "fp16")
    embeds, positions = prompt(model, "original")
    expected, logits = reference_greedy(model, embeds, positions, STEPS)
    session.start()
    table = embedding_table(model)
    rows, places = embeds.numpy(), positions.numpy()
    for token, wanted in zip(expected, logits, strict=True):
        ours = session.append(rows, places)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, wanted, atol=0.01 * np.abs(wanted).max())
        rows, places = table[[token]], places[-1:] + 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_tied_head_is_the_embedding(precision: str, tmp_path: Path) -> None:
    model = make_model(Qwen2Config(**SIZES, tie_word_embeddings=True), tmp_path, tied=True)
    assert "lm_head.weight" not in Checkpoint(tmp_path)
    embeds, positions = prompt(model, "compact")
    expected, logits = reference_greedy(model, embeds, positions, 1)
    session = load_static(tmp_path, precision)
    session.start()
    ours = session.append(embeds.numpy(), positions.numpy())
    np.testing.assert_allclose(ours, logits[0], atol=(0.01 if precision == "fp16" else 2e-4) * np.abs(logits).max())
    assert int(ours.argmax()) == expected[0]


def test_rows_are_written_in_place_and_no_others(tmp_path: Path) -> None:
    """Appending in pieces equals appending at once; the buffer behind the rows is neither read nor written."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load_static(tmp_path)
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    session.start()
    before = {name: array.copy() for name, array in session.arrays.items()}
    once = session.append(embeds, positions)
    filled = {name: array.copy() for name, array in session.arrays.items()}
    session.start()
    for cut in pieces(len(embeds), (7, 8, 9)):
        last = session.append(embeds[cut], positions[cut])
    np.testing.assert_allclose(last, once, atol=1e-4 * np.abs(once).max())
    for name, array in session.arrays.items():
        np.testing.assert_allclose(array[:, :, : len(embeds)], filled[name][:, :, : len(embeds)], atol=1e-4)
        np.testing.assert_array_equal(array[:, :, len(embeds) :], before[name][:, :, len(embeds) :])
        assert np.abs(array[:, :, : len(embeds)] - before[name][:, :, : len(embeds)]).max() > 0.01


def test_a_smaller_write_index_goes_back(tmp_path: Path) -> None:
    """A second question about the picture starts behind the first prompt's rows, over those of the first answer."""
    model = make_model(TEXT["qwen2"], tmp_path)
    session = load_static(tmp_path)
    embeds, positions = (part.numpy() for part in prompt(model, "compact"))
    session.start()
    session.append(embeds[:10], positions[:10])
    wanted = session.append(embeds[10:13], positions[10:13])
    session.append(embeds[13:20], positions[13:20])
    session.length = 10
    np.testing.assert_allclose(session.append(embeds[10:13], positions[10:13]), wanted, atol=1e-5)


def test_the_cache_can_be_filled_to_its_last_row(tmp_path: Path) -> None:
    model = make_model(TEXT["llama"], tmp_path)
    embeds, positions = (part.numpy() for part in prompt(model, "original"))
    exact = load_static(tmp_path, cache=len(embeds))
    exact.start()
    full = exact.append(embeds, positions)
    exact.start()
    exact.append(embeds[:-1], positions[:-1])
    np.testing.assert_allclose(exact.append(embeds[-1:], positions[-1:]), full, atol=1e-4 * np.abs(full).max())


def test_positions_matter(tmp_path: Path) -> None:
    """The parity above could not fail if the graph ignored positions and the policies agreed by chance."""
    model = make_model(TEXT["llama"], tmp_path)
    session = load_static(tmp_path)
    results = []
    for policy in ("compact", "original"):
        session.start()
        results.append(session.append(*(part.numpy() for part in prompt(model, policy))))
    assert np.abs(results[0] - results[1]).max() > 0.05 * np.abs(results[0]).max()


def test_the_contract_of_the_graph(tmp_path: Path) -> None:
    """Names, types and shapes that the engine's builder, checker and runner rely on; standard operators only."""
    make_model(TEXT["llama"], tmp_path)
    checkpoint = Checkpoint(tmp_path)
    info = export_engine_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "decoder", 48)
    assert (info.file, info.precision, info.opset, info.cache) == ("decoder/engine.onnx", "fp16", 24, 48)
    assert sorted(path.name for path in (tmp_path / "decoder").iterdir()) == ["engine.onnx", "engine.onnx.data"]
    onnx.checker.check_model(str(tmp_path / info.file), full_check=True)
    model = onnx.load(tmp_path / info.file, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    kinds = [node.op_type for node in model.graph.node]
    layers, heads, size = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"], 16
    assert (kinds.count("TensorScatter"), kinds.count("Attention")) == (2 * layers, layers)
    assert (kinds.count("RotaryEmbedding"), kinds.count("RMSNormalization")) == (2 * layers, 2 * layers + 1)
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    half, full, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    cache = (half, [1, heads, 48, size])
    assert _signature(model.graph.input) == {
        "inputs_embeds": (full, [1, "new", SIZES["hidden_size"]]),
        "position_ids": (whole, [1, "new"]),
        "write_index": (whole, [1]),
        **{f"past.{name}": cache for name in names},
    }
    assert _signature(model.graph.output) == {
        "logits": (full, [1, 1, SIZES["vocab_size"]]),
        **{f"present.{name}": cache for name in names},
    }
    norms = {i.name for i in model.graph.initializer if i.data_type == full}
    assert norms
    assert all("norm" in name for name in norms)  # every other float of the file is float16


def _signature(values: object) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize(
    ("cache", "precision", "said"),
    [
        (0, "fp16", "between 1 and 160"),
        (161, "fp16", "between 1 and 160, the model's context"),
        (CACHE, "int4", "choose fp16 or fp32"),
    ],
)
def test_refused_before_anything_is_written(cache: int, precision: str, said: str, tmp_path: Path) -> None:
    make_model(TEXT["llama"], tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match=said):
        export_engine_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "decoder", cache, precision)
    assert not (tmp_path / "decoder").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [(1e5, r"down_proj.weight has values up to 1e\+05, beyond float16"), (float("nan"), "the checkpoint is damaged")],
)
def test_a_weight_that_float16_does_not_have_is_refused(value: float, said: str, tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**SIZES), tmp_path)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match=said):
        export_engine_decoder(checkpoint, checkpoint.config["text_config"], tmp_path / "decoder", CACHE)
    assert not (tmp_path / "decoder" / "engine.onnx").exists()
