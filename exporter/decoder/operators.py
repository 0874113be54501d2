"""The operators of ONNX Runtime that the decoder graph is made of.

`graph.py` says what a decoder is; this module says how one of its steps is spelled for ONNX Runtime: standard
operators of opset 18 and com.microsoft's fused ones, which are what makes it quick on a CPU. A graph for another
runtime (opset 24 with a static cache) is a second class with these methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.quantise import BLOCK, quantise
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError

PRECISIONS = ("fp32", "int4")
OPSETS = {"": 18, "com.microsoft": 1}
_MS = "com.microsoft"
# MatMulNBits may also quantise its input to 8 bits (level 4), which is what makes int4 quick; 1 computes in float32.
_ACCURACY_LEVEL = 4


class Operators:
    """Appends nodes to `tape` and weights to `store`. Each weight is read from the checkpoint when its node is made."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, store: WeightFile, precision: str) -> None:
        self.tape = ir.tape.Tape()
        self.used: set[str] = set()  # canonical names of the tensors read
        self._config = config
        self._checkpoint = checkpoint
        self._store = store
        self._precision = precision
        self._constants: dict[str, ir.Value] = {}

    def op(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output, both named after `name`."""
        return self.ops(kind, inputs, [name], domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """One node with named outputs; an empty name is an output that is not wanted."""
        values = [ir.Value(name=name) for name in outputs]
        options: Mapping[str, Any] | None = attributes or None
        self.tape.op_multi_out(kind, inputs, options, outputs=values, domain=domain, name=f"{outputs[0]}/{kind}")
        return values

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant, made once per name."""
        if name not in self._constants:
            self._constants[name] = self.tape.initializer(ir.tensor(array, name=name))
        return self._constants[name]

    def table(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A float32 table in the data file, made once per name."""
        if name not in self._constants:
            self._constants[name] = self._stored(name, tensor.numpy())
        return self._constants[name]

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor of the checkpoint as float32, refusing one of another shape or of whole numbers."""
        info = self._checkpoint.info(name)
        if info.dtype not in ("F32", "F16", "BF16", "F64"):
            raise UserError(
                f"{name} is stored as {info.dtype}: the decoder export reads float weights, give the checkpoint from "
                "before its quantisation"
            )
        if info.shape != shape:
            raise UserError(
                f"{name} has shape {info.shape} where config.json makes it {shape}: they do not belong together"
            )
        self.used.add(name)
        return self._checkpoint.tensor(name).float()

    def rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis. ONNX Runtime fuses these into one kernel."""
        square = self.op("Pow", [x, self.constant("two", np.array(2.0, np.float32))], f"{name}/square")
        axis = self.constant("last_axis", np.array([-1], np.int64))
        mean = self.op("ReduceMean", [square, axis], f"{name}/mean", keepdims=1)
        shifted = self.op(
            "Add", [mean, self.constant("epsilon", np.array(self._config.epsilon, np.float32))], f"{name}/shifted"
        )
        root = self.op("Sqrt", [shifted], f"{name}/root")
        unit = self.op("Div", [x, root], f"{name}/unit")
        return self.op("Mul", [unit, self._norm_weight(weight, size)], name)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
        """rms_norm(x + residual) and the sum itself."""
        normed, _, _, total = self.ops(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._norm_weight(weight, self._config.hidden)],
            [name, "", "", f"{name}/sum"],
            _MS,
            epsilon=self._config.epsilon,
        )
        return normed, total

    def linear(
        self, x: ir.Value, name: str, outputs: int, inputs: int, bias: bool, bits: int | None = None
    ) -> ir.Value:
        """x W^T (+ b) with the checkpoint's `name`.weight, shape (outputs, inputs), in the precision of the export.

        bits: with quantised weights, how many instead of four.
        """
        weight = self.weight(f"{name}.weight", (outputs, inputs))
        if self._precision == "fp32":
            table = self._stored(f"{name}.weight", weight.T.contiguous().numpy())  # (inputs, outputs)
            result = self.op("MatMul", [x, table], name if not bias else f"{name}/product")
        else:
            packed = quantise(weight.numpy(), bits or 4)
            table = self._stored(f"{name}.weight.codes", packed.codes)
            scales = self._stored(f"{name}.weight.scales", packed.scales)
            zero_points = self._stored(f"{name}.weight.zero_points", packed.zero_points)
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
        shift = self._stored(f"{name}.bias", self.weight(f"{name}.bias", (outputs,)).numpy())
        return self.op("Add", [result, shift], name)

    def rotate(self, x: ir.Value, positions: ir.Value, name: str) -> ir.Value:
        """Rotary embedding of x (B, N, heads * head_dim) at explicit `positions` (B, N), which may have gaps."""
        cos, sin = self.table("rotary.cos", self._config.cos), self.table("rotary.sin", self._config.sin)
        return self.op("RotaryEmbedding", [x, positions, cos, sin], name, _MS)

    def attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past: tuple[ir.Value, ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        present: tuple[str, str],
        name: str,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention over the cache and the new rows: (B, N, heads * head_dim), present key, present value.

        lengths: what `cache_lengths` gave. Causal in the order of the rows, whatever their positions.
        """
        output, keys, values = self.ops(
            "GroupQueryAttention",
            [query, key, value, *past, *lengths],
            [name, *present],
            _MS,
            num_heads=self._config.heads,
            kv_num_heads=self._config.kv_heads,
            do_rotary=0,
        )
        return output, keys, values

    def cache_lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """From an attention mask (B, total): index of the last valid row int32 (B,), and total as an int32 scalar."""
        axis = self.constant("mask_axis", np.array([1], np.int64))
        count = self.op("ReduceSum", [mask, axis], "mask/count", keepdims=0)
        last = self.op("Sub", [count, self.constant("one", np.array(1, np.int64))], "mask/last")
        shape = self.op("Shape", [mask], "mask/shape")
        total = self.op("Gather", [shape, self.constant("one", np.array(1, np.int64))], "mask/total")
        to = int(ir.DataType.INT32)
        return self.op("Cast", [last], "mask/last_int32", to=to), self.op("Cast", [total], "mask/total_int32", to=to)

    def last_row(self, x: ir.Value, name: str) -> ir.Value:
        """(B, N, C) -> (B, 1, C)."""
        index = self.constant("last_axis", np.array([-1], np.int64))
        return self.op("Gather", [x, index], name, axis=1)

    def heads_norm(self, x: ir.Value, weight: str, heads: int, name: str) -> ir.Value:
        """rms_norm of each head of x (B, N, heads * head_dim) by itself."""
        size = self._config.head_dim
        split = self.constant(f"split_{heads}", np.array([0, 0, heads, size], np.int64))
        joined = self.constant("join_heads", np.array([0, 0, -1], np.int64))
        parts = self.op("Reshape", [x, split], f"{name}/heads")  # (B, N, heads, head_dim)
        normed = self.rms_norm(parts, weight, size, f"{name}/norm")
        return self.op("Reshape", [normed, joined], name)

    def _norm_weight(self, weight: str, size: int) -> ir.Value:
        return self.table(weight, self.weight(weight, (size,)))

    def _stored(self, name: str, array: np.ndarray) -> ir.Value:
        return self.tape.initializer(self._store.add(name, array))
