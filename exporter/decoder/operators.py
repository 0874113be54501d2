"""The operators of ONNX Runtime that the decoder graph is made of.

`graph.py` says what a decoder is; this module says how one of its steps is spelled for ONNX Runtime: standard
operators of opset 18 and com.microsoft's fused ones, which are what makes it quick on a CPU.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.grouped import GroupedRows, Windows
from svdprune.exporter.decoder.quantise import BLOCK, quantise
from svdprune.exporter.decoder.weights import WeightFile

PRECISIONS = ("fp32", "int4")
OPSETS = {"": 18, "com.microsoft": 1}
_MS = "com.microsoft"
# MatMulNBits may also quantise its input to 8 bits (level 4), which is what makes int4 quick; 1 computes in float32.
_ACCURACY_LEVEL = 4


class Operators(DecoderOperators):
    """See `DecoderOperators`. Everything is float32 but the codes of int4 weights. Call `begin` before the layers."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, store: WeightFile, precision: str) -> None:
        super().__init__(config, checkpoint, store)
        self._precision = precision

    def begin(self, mask: ir.Value, positions: ir.Value, groups: ir.Value | None) -> None:
        """Make what all layers share from the inputs of the graph; `groups` where the config's mask wants them."""
        self._lengths = self._cache_lengths(mask)
        self._positions = positions if self._config.axes is None else self._places(positions)
        self._rotaries = [self._rotary(i, positions) for i in range(len(self._config.rotaries))]
        self._biases: dict[int, ir.Value] = {}
        self._groups: GroupedRows | None = None
        if groups is not None or any(self._config.windows):
            windows = Windows(self, self._config, positions, self._lengths[1])
            self._biases = windows.biases
            self._groups = None if groups is None else GroupedRows(self, self._config, groups, windows)

    def rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """See `DecoderOperators`. ONNX Runtime fuses these into one kernel."""
        square = self.op("Pow", [x, self.constant("two", np.array(2.0, np.float32))], f"{name}/square")
        axis = self.constant("last_axis", np.array([-1], np.int64))
        mean = self.op("ReduceMean", [square, axis], f"{name}/mean", keepdims=1)
        shifted = self.op(
            "Add", [mean, self.constant("epsilon", np.array(self._config.epsilon, np.float32))], f"{name}/shifted"
        )
        root = self.op("Sqrt", [shifted], f"{name}/root")
        unit = self.op("Div", [x, root], f"{name}/unit")
        return self.op("Mul", [unit, self.norm_weight(weight, size)], name)

    def after_norm(self, x: ir.Value, weight: str, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        return self.rms_norm(x, weight, self._config.hidden, name)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
        """See `DecoderOperators`."""
        normed, _, _, total = self.ops(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.norm_weight(weight, self._config.hidden)],
            [name, "", "", f"{name}/sum"],
            _MS,
            epsilon=self._config.epsilon,
        )
        return normed, total

    def linear(
        self, x: ir.Value, name: str, outputs: int, inputs: int, bias: bool, bits: int | None = None
    ) -> ir.Value:
        """See `DecoderOperators`."""
        weight = self.weight(f"{name}.weight", (outputs, inputs)).float()
        if self._precision == "fp32":
            table = self.stored(f"{name}.weight", weight.T.contiguous().numpy())  # (inputs, outputs)
            result = self.op("MatMul", [x, table], name if not bias else f"{name}/product")
        else:
            packed = quantise(weight.numpy(), bits or 4)
            table = self.stored(f"{name}.weight.codes", packed.codes)
            scales = self.stored(f"{name}.weight.scales", packed.scales)
            zero_points = self.stored(f"{name}.weight.zero_points", packed.zero_points)
            result = self.op(
                "MatMulNBits",
                [x, table, scales, zero_points],
                name if not bias else f"{name}/product",
                _MS,
                K=inputs,
                N=outputs,
                bits=packed.bits,
                block_size=BLOCK,
                accuracy_level=_ACCURACY_LEVEL,
            )
        if not bias:
            return result
        shift = self.stored(f"{name}.bias", self.weight(f"{name}.bias", (outputs,)).float().numpy())
        return self.op("Add", [result, shift], name)

    def activate(self, x: ir.Value, name: str) -> ir.Value:
        """See `DecoderOperators`. FastGelu is GELU by tanh."""
        return self.silu(x, name) if self._config.activation == "silu" else self.op("FastGelu", [x], name, _MS)

    def rotate(self, layer: int, x: ir.Value, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        cos, sin = self._rotaries[self._config.rotary_of[layer]]
        return self.op("RotaryEmbedding", [x, self._positions, cos, sin], name, _MS)

    def attend(
        self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `DecoderOperators`.

        GroupQueryAttention writes the cache and sees earlier rows only. A run with groups then does its attention over
        again under a mask: that is a prompt, where attention is a small part, and a step of decoding keeps the kernel.
        """
        config, window = self._config, self._config.windows[layer]
        inputs: list[ir.Value | None] = [query, key, value, *past, *self._lengths]
        if window is not None:
            inputs += [None, None, None, self._biases[window]]
        numbers = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        output, keys, values = self.ops(
            "GroupQueryAttention",
            inputs,
            [name if self._groups is None else f"{name}/causal", f"present.{layer}.key", f"present.{layer}.value"],
            _MS,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=0,
            **{name: number for name, number in numbers.items() if number is not None},
        )
        if self._groups is not None:
            output = self._groups.attend(query, keys, values, output, window, name)
        return output, keys, values

    def _rotary(self, index: int, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Tables (rows, D / 2) of cos and sin that `self._positions` points into."""
        found = []
        for part in ("cos", "sin"):
            name = f"rotary.{part}" if index == 0 else f"rotary.{index}.{part}"
            table = self.table(name, getattr(self._config.rotaries[index], part))
            if self._config.axes is not None:  # a table of this run's rows
                flat = self.constant("flat_rows", np.array([-1, self._config.head_dim // 2], np.int64))
                table = self.op("Reshape", [self.mix_axes(positions, table, f"{name}/mixed"), flat], f"{name}/run")
            found.append(table)
        return found[0], found[1]

    def _places(self, positions: ir.Value) -> ir.Value:
        """Positions (3, B, N) -> int64 (B, N), the rows of the run counted: where `_rotary` has their cos and sin."""
        shape = self.op("Shape", [positions], "rotary.places/shape", start=1)
        count = self.op("ReduceProd", [shape], "rotary.places/count", keepdims=0)
        zero, one = self.constant("zero", np.array(0, np.int64)), self.constant("one", np.array(1, np.int64))
        return self.op("Reshape", [self.op("Range", [zero, count, one], "rotary.places/all"), shape], "rotary.places")

    def _cache_lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """From an attention mask (B, total): index of the last valid row int32 (B,), and total as an int32 scalar."""
        axis = self.constant("mask_axis", np.array([1], np.int64))
        count = self.op("ReduceSum", [mask, axis], "mask/count", keepdims=0)
        last = self.op("Sub", [count, self.constant("one", np.array(1, np.int64))], "mask/last")
        shape = self.op("Shape", [mask], "mask/shape")
        total = self.op("Gather", [shape, self.constant("one", np.array(1, np.int64))], "mask/total")
        to = int(ir.DataType.INT32)
        return self.op("Cast", [last], "mask/last_int32", to=to), self.op("Cast", [total], "mask/total_int32", to=to)

    def split_heads(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        """The kernels take the heads side by side, (B, N, heads * head_dim): x as it is."""
        return x

    def heads_norm(self, x: ir.Value, weight: str, heads: int, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        size = self._config.head_dim
        split = self.constant(f"split_{heads}", np.array([0, 0, heads, size], np.int64))
        joined = self.constant("join_heads", np.array([0, 0, -1], np.int64))
        parts = self.op("Reshape", [x, split], f"{name}/heads")  # (B, N, heads, head_dim)
        normed = self.rms_norm(parts, weight, size, f"{name}/norm")
        return self.op("Reshape", [normed, joined], name)
