"""What ONNX Runtime's optimiser makes of the towers: activations, attention scales and norms are each one kernel."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch

from svdprune.exporter.towers.layers import Encoder, activation

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "layer_norm_eps": 1e-5}
LAYERS = 2


def optimised(folder: Path, act: str) -> collections.Counter[str]:
    """Operators of a tower's layers after ONNX Runtime has opened it."""
    layers = torch.nn.Sequential(*Encoder({**SIZES, "hidden_act": act}, LAYERS).layers).eval()
    program = torch.onnx.export(
        layers,
        (torch.zeros(2, 9, SIZES["hidden_size"]),),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    assert program is not None
    program.save(folder / "layers.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(folder / "layers.onnx"), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


@pytest.mark.parametrize(
    ("act", "kernel"),
    [("quick_gelu", "QuickGelu"), ("gelu", "BiasGelu"), ("gelu_pytorch_tanh", "FastGelu"), ("silu", "QuickGelu")],
)
def test_each_step_of_a_layer_is_one_kernel(tmp_path: Path, act: str, kernel: str) -> None:
    found = optimised(tmp_path, act)
    assert found[kernel] == LAYERS
    assert found["LayerNormalization"] == 2 * LAYERS
    assert found["FusedMatMul"] == LAYERS  # the scale of the attention is in the product
    assert found["Transpose"] == 4 * LAYERS  # query, key, value, result
    left = set(found) - {kernel, "LayerNormalization", "FusedMatMul", "Transpose"}
    assert left == {"MatMul", "Add", "Softmax", "Reshape"}


@pytest.mark.parametrize(("act", "approximate"), [("gelu", "none"), ("gelu_pytorch_tanh", "tanh")])
def test_the_written_out_gelu_is_torchs(act: str, approximate: str) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate=approximate)
    torch.testing.assert_close(activation(act)(x), expected, rtol=0, atol=1e-12)
