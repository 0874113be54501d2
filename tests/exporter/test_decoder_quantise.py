"""Block-wise weights: the layout that ONNX Runtime reads, the error they cost, and an int4 decoder built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from svdprune.exporter.decoder import quantise as module
from svdprune.exporter.decoder.quantise import BLOCK, Quantised, quantise
from tests.exporter.decoder_models import SIZES, TEXT, exported_greedy, load, make_model, prompt, reference_greedy


def error(weight: np.ndarray, bits: int) -> float:
    """Root of the squared error relative to the weights' own."""
    back = quantise(weight, bits).dequantise(weight.shape[1])
    return float(np.linalg.norm(back - weight) / np.linalg.norm(weight))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 64, 96, 80, 7])  # an odd number of blocks, and blocks that are not full
def test_onnxruntime_reads_the_codes_as_dequantise_does(bits: int, inputs: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(24, inputs)) + 0.3).astype(np.float32)
    packed = quantise(weight, bits)
    x = rng.normal(size=(5, inputs)).astype(np.float32)
    np.testing.assert_allclose(
        matmul(x, packed, accuracy_level=1), x @ packed.dequantise(inputs).T, atol=2e-5 * inputs**0.5
    )


def matmul(x: np.ndarray, packed: Quantised, accuracy_level: int) -> Any:
    tape = ir.tape.Tape()
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    arrays = {"codes": packed.codes, "scales": packed.scales, "zero_points": packed.zero_points}
    weights = [tape.initializer(ir.tensor(array, name=name)) for name, array in arrays.items()]
    out = tape.op(
        "MatMulNBits",
        [value, *weights],
        {
            "K": x.shape[1],
            "N": len(packed.scales),
            "bits": packed.bits,
            "block_size": packed.block,
            "accuracy_level": accuracy_level,
        },
        domain="com.microsoft",
    )
    out.dtype, out.shape = ir.DataType.FLOAT, ir.Shape((len(x), len(packed.scales)))
    graph = ir.Graph(
        [value], [out], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 18, "com.microsoft": 1}
    )
    model = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    return ort.InferenceSession(model).run(None, {"x": x})[0]


def symmetric_error(weight: np.ndarray) -> float:
    """The usual symmetric code of 4 bits: the largest weight of a block is -8."""
    blocks = weight.reshape(-1, BLOCK)
    index = np.abs(blocks).argmax(1)[:, None]
    scale = np.take_along_axis(blocks, index, 1) / -8
    back = np.clip(np.rint(blocks / scale), -8, 7) * scale
    return float(np.linalg.norm(back - blocks) / np.linalg.norm(blocks))


@pytest.mark.parametrize("draw", ["normal", "heavy tails"])
def test_error_and_what_zero_points_and_search_give(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the module's docstring."""
    rng = np.random.default_rng(1)
    heavy = draw != "normal"
    weight = (rng.standard_t(5, (512, 512)) if heavy else rng.normal(size=(512, 512))).astype(np.float32)
    searched = error(weight, 4)
    assert searched < (0.093 if heavy else 0.080)
    assert error(weight, 8) < 0.007
    monkeypatch.setitem(module._SHARES, 4, (1.0,))
    unsearched = error(weight, 4)
    assert 0.96 < searched / unsearched < 0.985
    assert searched / symmetric_error(weight) < (0.86 if heavy else 0.93)


def test_a_constant_block_and_zeros_are_kept() -> None:
    weight = np.zeros((3, 2 * BLOCK), np.float32)
    weight[1, :BLOCK], weight[2, 5] = -0.25, 3.0
    np.testing.assert_allclose(quantise(weight, 4).dequantise(2 * BLOCK), weight, atol=1e-6)


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).normal(size=(40, 96)).astype(np.float32)
    whole = quantise(weight, 4)
    monkeypatch.setattr(module, "_CHUNK", 7)
    pieces = quantise(weight, 4)
    for name in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))


@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads", "qwen3"])
def test_an_int4_decoder_is_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    """Against transformers with the weights that the codes stand for; the 8-bit input of MatMulNBits remains."""
    model = make_model(TEXT[name], tmp_path)
    embeds, positions = prompt(model, "original")
    _, full = reference_greedy(model, embeds, positions, 1)
    session = load(tmp_path, "int4")
    assert session.info.precision == "int4"
    _, ours = exported_greedy(session, np.load(tmp_path / "int4" / "embed_tokens.npy"), embeds, positions, 1)
    with torch.no_grad():
        for part, module_ in [*model.model.language_model.named_modules(), ("lm_head", model.lm_head)]:
            if isinstance(module_, torch.nn.Linear):
                bits = 8 if part == "lm_head" else 4
                codes = quantise(module_.weight.numpy(), bits)
                module_.weight.copy_(torch.from_numpy(codes.dequantise(module_.in_features)))
    _, expected = reference_greedy(model, embeds, positions, 1)
    assert np.isfinite(ours).all()
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(ours - expected) < 0.05 * scale
    assert np.linalg.norm(full - expected) > 2 * np.linalg.norm(ours - expected)  # it is not simply the full weights
    assert ours.shape == (1, SIZES["vocab_size"])
