"""What the spellings of the decoder graph share: a tape of nodes, constants, and weights read one at a time.

`graph.py` says what a decoder is, in calls of `DecoderOperators`; a subclass says how each call is spelled for one
runtime. `operators.py` is ONNX Runtime's, `static_operators.py` that of a TensorRT engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import DecoderConfig
from svdprune.exporter.decoder.weights import WeightFile
from svdprune.runtime.errors import UserError


class DecoderOperators(ABC):
    """Appends nodes to `tape` and weights to `store`. Each weight is read from the checkpoint when its node is made."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, store: WeightFile) -> None:
        self.tape = ir.tape.Tape()
        self._nodes = self.tape  # where nodes go: the tape, or that of a branch
        self.used: set[str] = set()  # canonical names of the tensors read
        self._config = config
        self._checkpoint = checkpoint
        self._store = store
        self._constants: dict[str, ir.Value] = {}

    # ---- what a decoder is made of: one spelling a subclass ------------------------------------------------------
    @abstractmethod
    def rms_norm(self, x: ir.Value, weight: str, size: int, name: str) -> ir.Value:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, ready for `linear`."""

    @abstractmethod
    def after_norm(self, x: ir.Value, weight: str, name: str) -> ir.Value:
        """rms_norm of what `linear` gave, ready for `add_norm`: the norm behind attention or MLP."""

    @abstractmethod
    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
        """rms_norm(x + residual) and the sum itself. x is of `linear` or `after_norm`."""

    @abstractmethod
    def linear(
        self, x: ir.Value, name: str, outputs: int, inputs: int, bias: bool, bits: int | None = None
    ) -> ir.Value:
        """x W^T (+ b) with the checkpoint's `name`.weight, shape (outputs, inputs), in the precision of the export.

        bits: with quantised weights, how many instead of four.
        """

    @abstractmethod
    def split_heads(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        """(B, N, heads * head_dim) in the layout that the following three take, which is the subclass's matter."""

    @abstractmethod
    def heads_norm(self, x: ir.Value, weight: str, heads: int, name: str) -> ir.Value:
        """rms_norm of each head of x by itself."""

    @abstractmethod
    def activate(self, x: ir.Value, name: str) -> ir.Value:
        """The gate's activation."""

    @abstractmethod
    def rotate(self, layer: int, x: ir.Value, name: str) -> ir.Value:
        """Rotary embedding of x at the explicit positions of this run's rows, which may have gaps."""

    @abstractmethod
    def attend(
        self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attention over the cache and the new rows: (B, N, heads * head_dim), `present.{layer}.key` and `.value`.

        Who sees whom goes by the order of the rows, whatever their positions: the rows before and the row itself,
        as far as the layer's window reaches, and what the config's `mask` adds to that.
        """

    def silu(self, x: ir.Value, name: str) -> ir.Value:
        """x * sigmoid(x)."""
        return self.op("Mul", [x, self.op("Sigmoid", [x], f"{name}/sigmoid")], name)

    def softcap(self, x: ir.Value, limit: float, name: str, dtype: type = np.float32) -> ir.Value:
        """limit * tanh(x / limit), of x of this dtype."""
        cap = self.constant(f"softcap_{limit:g}_{np.dtype(dtype).name}", np.array(limit, dtype))
        return self.op("Mul", [self.op("Tanh", [self.op("Div", [x, cap], f"{name}/share")], f"{name}/tanh"), cap], name)

    def attention_scale(self, kind: type) -> ir.Value:
        """What the products of queries and keys are multiplied by, of this dtype."""
        scale = self._config.attention_scale or self._config.head_dim**-0.5
        return self.constant("attention_scale", np.array(scale, kind))

    def mix_axes(self, positions: ir.Value, table: ir.Value, name: str) -> ir.Value:
        """M-RoPE: rows of a rotary table (context, D / 2) at positions (3, B, N), each column by its own axis.

        Gives (B, N, D / 2). All layers share it: it is made once a run.
        """
        axes = self._config.axes
        assert axes is not None
        kind = table.dtype.numpy() if table.dtype is not None else np.float32
        chosen = (axes == torch.arange(self._config.position_axes)[:, None]).numpy()  # (3, D / 2)
        share = self.constant("rotary.axes", chosen[:, None, None].astype(kind))
        rows = self.op("Gather", [table, positions], f"{name}/rows", axis=0)  # (3, B, N, D / 2)
        first = self.constant("first_axis", np.array([0], np.int64))
        return self.op("ReduceSum", [self.op("Mul", [rows, share], f"{name}/shares"), first], name, keepdims=0)

    # ---- nodes and weights -----------------------------------------------------------------------------------------
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
        self._nodes.op_multi_out(kind, inputs, options, outputs=values, domain=domain, name=f"{outputs[0]}/{kind}")
        return values

    def branch(self, result: Callable[[], ir.Value], name: str) -> ir.Graph:
        """A branch of an If: the nodes that `result` makes, and its one output. Constants go to the main graph."""
        outer, self._nodes = self._nodes, ir.tape.Tape()
        try:
            output = result()
            return ir.Graph([], [output], nodes=self._nodes.nodes, name=name)
        finally:
            self._nodes = outer

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant, made once per name."""
        if name not in self._constants:
            self._constants[name] = self.tape.initializer(ir.tensor(array, name=name))
        return self._constants[name]

    def table(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A table in the data file, of the tensor's type, made once per name."""
        if name not in self._constants:
            self._constants[name] = self.stored(name, tensor.numpy())
        return self._constants[name]

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor of the checkpoint as it is stored, refusing one of another shape or of whole numbers."""
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
        return self._checkpoint.tensor(name)

    def stored(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser in the data file."""
        return self.tape.initializer(self._store.add(name, array))

    def norm_weight(self, name: str, size: int) -> ir.Value:
        """What a norm multiplies by, float32."""
        return self.table(name, self.weight(name, (size,)).float() + self._config.norm_offset)

    def last_row(self, x: ir.Value, name: str) -> ir.Value:
        """(B, N, C) -> (B, 1, C)."""
        index = self.constant("last_axis", np.array([-1], np.int64))
        return self.op("Gather", [x, index], name, axis=1)
