"""The operators of a TensorRT engine that the decoder graph is made of: standard ones of opset 24, strongly typed.

TensorScatter writes the new rows into a cache of fixed length, which TensorRT does in place; Attention reads all of it
under a mask. TensorRT has these from 10.15 on, and TensorRT-RTX.

Weights, cache and matrix products are float16. The residual stream and the norms are float32: sums of many layers lose
digits in float16, and some models' rows leave its range. Attention has no softmax type to choose (TensorRT refuses
`softmax_precision`); its kernels accumulate in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError

STATIC_OPSET = 24
STATIC_PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


class StaticOperators(DecoderOperators):
    """See `DecoderOperators`. Heads are laid out (1, heads, N, head_dim); `where` is (write_index, mask).

    Residuals are float32, all that goes into or comes out of `linear` has the precision of the export.
    """

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, store: WeightFile, precision: str) -> None:
        super().__init__(config, checkpoint, store)
        self._dtype = STATIC_PRECISIONS[precision]

    def rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """See `DecoderOperators`. x is float32."""
        scale = self.table(weight, self.weight(weight, (size,)).float())
        exact = "" if self._dtype == torch.float32 else "/float"
        normed = self.op("RMSNormalization", [x, scale], name + exact, axis=-1, epsilon=self._config.epsilon)
        return self._narrow(normed, name)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
        """See `DecoderOperators`. The sum is float32."""
        total = self.op("Add", [self.widen(x, f"{name}/addend"), residual], f"{name}/sum")
        return self.rms_norm(total, weight, self._config.hidden, name), total

    def linear(
        self, x: ir.Value, name: str, outputs: int, inputs: int, bias: bool, bits: int | None = None
    ) -> ir.Value:
        """See `DecoderOperators`."""
        weight = self._typed(f"{name}.weight", (outputs, inputs))
        table = self.stored(f"{name}.weight", weight.T.contiguous().numpy())  # (inputs, outputs)
        result = self.op("MatMul", [x, table], name if not bias else f"{name}/product")
        if not bias:
            return result
        shift = self.stored(f"{name}.bias", self._typed(f"{name}.bias", (outputs,)).numpy())
        return self.op("Add", [result, shift], name)

    def split_heads(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        """(1, N, heads * head_dim) -> (1, heads, N, head_dim)."""
        split = self.constant(f"split_{heads}", np.array([0, 0, heads, self._config.head_dim], np.int64))
        return self.op("Transpose", [self.op("Reshape", [x, split], f"{name}/split")], name, perm=[0, 2, 1, 3])

    def heads_norm(self, x: ir.Value, weight: str, heads: int, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        return self.rms_norm(self.widen(x, f"{name}/wide"), weight, self._config.head_dim, name)

    def rotate(self, x: ir.Value, positions: ir.Value, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        cos = self.table("rotary.cos", self._config.cos.to(self._dtype))
        sin = self.table("rotary.sin", self._config.sin.to(self._dtype))
        return self.op("RotaryEmbedding", [x, cos, sin, positions], name)

    def attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past: tuple[ir.Value, ir.Value],
        where: tuple[ir.Value, ir.Value],
        present: tuple[str, str],
        name: str,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `DecoderOperators`. Keys and values are the whole cache, (1, kv_heads, C, head_dim)."""
        write_index, mask = where
        keys = self.op("TensorScatter", [past[0], key, write_index], present[0])  # axis -2
        values = self.op("TensorScatter", [past[1], value, write_index], present[1])
        rows = self.op("Attention", [query, keys, values, mask], f"{name}/heads")  # (1, heads, N, head_dim)
        joined = self.constant("join_heads", np.array([0, 0, -1], np.int64))
        turned = self.op("Transpose", [rows], f"{name}/rows", perm=[0, 2, 1, 3])
        return self.op("Reshape", [turned, joined], name), keys, values

    def cache_mask(self, embeds: ir.Value, write_index: ir.Value, cache: int) -> ir.Value:
        """Which of the cache's rows each new row sees: bool (1, 1, N, cache), true for c <= write_index + n.

        An explicit mask and not `is_causal` with `nonpad_kv_seqlen`: opset 24 leaves open where that aligns the
        triangle (25 settles it), and TensorRT 10's attention takes no lengths.
        """
        zero, one = self.constant("zero", np.array(0, np.int64)), self.constant("one", np.array(1, np.int64))
        count = self.op("Squeeze", [self.op("Shape", [embeds], "mask/shape", start=1, end=2)], "mask/count")
        new = self.op("Range", [zero, count, one], "mask/new")  # (N,)
        limit = self.op("Add", [new, write_index], "mask/limit")
        # All four dimensions before the comparison: with an Unsqueeze behind it, TensorRT-RTX 1.7 fails on several
        # layers for head sizes of 24, 80, 96 and 128 ("more than one op named mask/...").
        column = self.op("Reshape", [limit, self.constant("column", np.array([1, 1, -1, 1], np.int64))], "mask/column")
        rows = self.constant("cache_rows", np.arange(cache, dtype=np.int64).reshape(1, 1, 1, cache))
        return self.op("LessOrEqual", [rows, column], "mask")

    def widen(self, x: ir.Value, name: str) -> ir.Value:
        """To float32."""
        return x if self._dtype == torch.float32 else self.op("Cast", [x], name, to=int(ir.DataType.FLOAT))

    def _narrow(self, x: ir.Value, name: str) -> ir.Value:
        """To the precision of the export."""
        return x if self._dtype == torch.float32 else self.op("Cast", [x], name, to=int(ir.DataType.FLOAT16))

    def _typed(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight in the precision of the export, refused where that has no such number."""
        weight = self.weight(name, shape)
        typed = weight.to(self._dtype)
        if not bool(typed.isfinite().all()):
            what = "holds NaN or infinity: the checkpoint is damaged"
            if bool(weight.isfinite().all()):
                largest = float(weight.abs().max())
                what = f"has values up to {largest:.3g}, beyond float16: export with --decoder-engine none"
            raise UserError(f"{name} {what}")
        return typed
