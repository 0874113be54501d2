"""The operators of a TensorRT engine that the decoder graph is made of: standard ones of opset 24, strongly typed.

TensorScatter writes the new rows into a cache of fixed length, which TensorRT does in place; Attention reads all of it
under a mask. TensorRT has these from 10.15 on, and TensorRT-RTX.

Weights, cache and matrix products are float16. The residual stream and the norms are float32: sums of many layers lose
digits in float16, and some models' rows leave its range. Attention has no softmax type to choose (TensorRT refuses
`softmax_precision`); its kernels accumulate in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.base import DecoderOperators
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.static_masks import cache_masks
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError

STATIC_OPSET = 24
STATIC_PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
STATIC_KINDS = {torch.float16: np.float16, torch.float32: np.float32}


class StaticOperators(DecoderOperators):
    """See `DecoderOperators`. Heads are laid out (1, heads, N, head_dim). Call `begin` before the layers.

    Residuals are float32, all that goes into or comes out of `linear` has the precision of the export.
    """

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, store: WeightFile, precision: str) -> None:
        super().__init__(config, checkpoint, store)
        self._dtype = STATIC_PRECISIONS[precision]

    def begin(
        self, embeds: ir.Value, positions: ir.Value, write_index: ir.Value, groups: ir.Value | None, cache: int
    ) -> None:
        """Make what all layers share from the inputs of the graph; `cache` is the rows of the cache."""
        self._write_index, self._positions = write_index, positions
        self._masks = cache_masks(self, self._config, embeds, write_index, groups, cache)
        self._rotaries = [self._rotary(i, positions) for i in range(len(self._config.rotaries))]

    def rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """See `DecoderOperators`. x is float32."""
        exact = "" if self._dtype == torch.float32 else "/float"
        return self._narrow(self._rms_norm(x, weight, size, name + exact), name)

    def after_norm(self, x: ir.Value, weight: str, name: str) -> ir.Value:
        """See `DecoderOperators`. float32, as it goes to the residual stream and may be beyond float16."""
        return self._rms_norm(self.widen(x, f"{name}/wide"), weight, self._config.hidden, name)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
        """See `DecoderOperators`. The sum is float32."""
        addend = x if self._config.sandwich else self.widen(x, f"{name}/addend")
        total = self.op("Add", [addend, residual], f"{name}/sum")
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

    def activate(self, x: ir.Value, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        return (
            self.silu(x, name) if self._config.activation == "silu" else self.op("Gelu", [x], name, approximate="tanh")
        )

    def rotate(self, layer: int, x: ir.Value, name: str) -> ir.Value:
        """See `DecoderOperators`."""
        places = [] if self._config.axes is not None else [self._positions]  # this run's rows, or a table of all
        return self.op("RotaryEmbedding", [x, *self._rotaries[self._config.rotary_of[layer]], *places], name)

    def attend(
        self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `DecoderOperators`. Keys and values are the whole cache, (1, kv_heads, C, head_dim)."""
        keys = self.op("TensorScatter", [past[0], key, self._write_index], f"present.{layer}.key")  # axis -2
        values = self.op("TensorScatter", [past[1], value, self._write_index], f"present.{layer}.value")
        mask = self._masks[self._config.windows[layer]]
        if self._config.attention_softcap is not None:
            rows = self._capped(query, keys, values, mask, f"{name}/heads")
        else:
            own = self._config.attention_scale
            scale: dict[str, Any] = {} if own is None else {"scale": own}
            rows = self.op("Attention", [query, keys, values, mask], f"{name}/heads", **scale)
        joined = self.constant("join_heads", np.array([0, 0, -1], np.int64))
        turned = self.op("Transpose", [rows], f"{name}/rows", perm=[0, 2, 1, 3])  # (1, N, heads, head_dim)
        return self.op("Reshape", [turned, joined], name), keys, values

    def _capped(self, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value, name: str) -> ir.Value:
        """Attention with softcapped products, spelled out: TensorRT's Attention has no `softcap`.

        The products are scaled before they are made, as float16 may not hold them, and float32 up to the softmax.
        """
        config, limit = self._config, self._config.attention_softcap
        assert limit is not None
        kind = STATIC_KINDS[self._dtype]
        shares = [1, config.kv_heads, config.heads // config.kv_heads, -1, config.head_dim]
        split = self.constant("split_shares", np.array(shares, np.int64))
        scale = self.attention_scale(kind)
        axis = self.constant("share_axis", np.array([2], np.int64))
        heads = self.op("Reshape", [self.op("Mul", [query, scale], f"{name}/scaled"), split], f"{name}/split")
        turned = self.op("Transpose", [keys], f"{name}/turned", perm=[0, 1, 3, 2])
        turned = self.op("Unsqueeze", [turned, axis], f"{name}/keys")  # (1, kv_heads, 1, head_dim, C)
        scores = self.widen(self.op("MatMul", [heads, turned], f"{name}/scores"), f"{name}/wide")
        scores = self.softcap(scores, limit, f"{name}/capped")  # (1, kv_heads, shares, N, C)
        unseen = self.constant("unseen", np.array(-np.inf, np.float32))
        scores = self.op("Where", [self.op("Unsqueeze", [mask, axis], f"{name}/mask"), scores, unseen], f"{name}/seen")
        weights = self._narrow(self.op("Softmax", [scores], f"{name}/softmax", axis=-1), f"{name}/weights")
        rows = self.op("MatMul", [weights, self.op("Unsqueeze", [values, axis], f"{name}/values")], f"{name}/sums")
        joined = self.constant("join_shares", np.array([1, config.heads, -1, config.head_dim], np.int64))
        return self.op("Reshape", [rows, joined], name)

    def _rotary(self, index: int, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin: tables (context, D / 2), or with M-RoPE those of this run's rows (1, N, D / 2)."""
        found = []
        for part in ("cos", "sin"):
            name = f"rotary.{part}" if index == 0 else f"rotary.{index}.{part}"
            table = self.table(name, getattr(self._config.rotaries[index], part).to(self._dtype))
            found.append(table if self._config.axes is None else self.mix_axes(positions, table, f"{name}/run"))
        return found[0], found[1]

    def _rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """float32 from float32."""
        return self.op(
            "RMSNormalization", [x, self.norm_weight(weight, size)], name, axis=-1, epsilon=self._config.epsilon
        )

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
