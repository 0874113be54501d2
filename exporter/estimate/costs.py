"""The work of each stage of one request, in groups of operations of all layers together.

vision (tower), selection, connector, prefill of the language model, and one decode step. Attention is counted as fused:
its scores never go to memory. FLOPs are those of matrix products (`svdprune.runtime.roofline`).
"""

from __future__ import annotations

from dataclasses import dataclass

from svdprune.exporter.decoder.quantise import BLOCK
from svdprune.exporter.estimate.shapes import Connector, Linear, Text, Tower
from svdprune.runtime.roofline import Work

# Bits that a weight takes in memory. int4 as the exporter writes it: a float32 scale and a 4-bit zero point for each
# block; fp4 (NVFP4): an 8-bit scale for each 16.
WEIGHT_BITS = {
    "fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.0, "fp8": 8.0,
    "int4": 4.0 + (32 + 4) / BLOCK, "fp4": 4.0 + 8 / 16,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How a part's weights are stored and its products computed.

    `bits` of a weight, scales included; `precision` of the arithmetic; `head` and `head_bits` of the output projection,
    which weight-only formats keep finer.
    """

    precision: str
    bits: float
    head: str
    head_bits: float

    @property
    def activation(self) -> str:
        """The precision of attention and of what goes from one product to the next."""
        return self.precision if self.precision in ("fp32", "bf16") else "fp16"

    @property
    def activation_bytes(self) -> int:
        return 4 if self.activation == "fp32" else 2


def format_of(precision: str) -> Format:
    """The format that the exporter writes for a precision; int4 has an output projection of 8 bits."""
    if precision == "int4":
        return Format("int4", WEIGHT_BITS["int4"], "fp16", 8.0 + (32 + 8) / BLOCK)
    return Format(precision, WEIGHT_BITS[precision], precision, WEIGHT_BITS[precision])


def vision_work(tower: Tower, crops: int, form: Format) -> list[Work]:
    """The tower up to its tap, `crops` crops in one batch."""
    rows, width = crops * tower.sequence, form.activation_bytes
    spans = [(tower.run - tower.windowed, tower.sequence), (tower.windowed, min(tower.window, tower.sequence))]
    embed = Linear(tower.channels * tower.frames * tower.patch**2, tower.dim)
    works = [_linear("patch embedding", embed, crops * tower.patches, form, weights=tower.fixed)]
    works += [_linear(name, linear, rows, form).times(tower.run) for name, linear in tower.linears]
    works += [
        Work(
            "attention", 4 * rows * span * tower.dim, moved=4 * rows * tower.dim * width, precision=form.activation
        ).times(layers)
        for layers, span in spans
        if layers
    ]
    works.append(_norms(tower.dim, rows, form).times(tower.run))
    return works


def connector_work(connector: Connector, rows: int, form: Format) -> list[Work]:
    """The products between tower and language model, on `rows` rows."""
    return [
        _linear(f"product {number + 1}", linear, rows, form).times(connector.copies)
        for number, linear in enumerate(connector.linears)
    ]


def decoder_work(text: Text, rows: int, past: int, batch: int, form: Format) -> list[Work]:
    """The language model on `rows` new rows of each of `batch` sequences that have `past` rows cached.

    Prefill has past 0; a decode step has one row. Attention is causal. The output projection sees the last row alone.
    """
    works = [_linear(name, linear, batch * rows, form).times(text.layers) for name, linear in text.linears]
    looked_at = _causal(rows, past, text.window)  # (query, key) pairs
    queries, keys, width = text.heads * text.head_dim, text.kv_heads * text.head_dim, form.activation_bytes
    cached = min(past, text.window or past) + rows
    works.append(
        Work(
            "attention",
            4 * batch * looked_at * queries,
            moved=2 * batch * rows * queries * width,
            cache=2 * batch * keys * (cached + rows) * width,  # read once by the group, new rows written
            precision=form.activation,
        ).times(text.layers)
    )
    works.append(_norms(text.hidden, batch * rows, form).times(text.layers))
    head = Format(form.head, form.head_bits, form.head, form.head_bits)
    works.append(_linear("output projection", Linear(text.hidden, text.vocab, bias=False), batch, head))
    return works


def _causal(rows: int, past: int, window: int | None) -> int:
    """Pairs of a new row and a row it looks at."""
    if window is None or past + rows <= window:
        return rows * past + rows * (rows + 1) // 2
    return sum(min(past + row + 1, window) for row in range(rows))


def _linear(name: str, linear: Linear, rows: int, form: Format, weights: int | None = None) -> Work:
    """One product; `weights` are its parameters where they are not those of `linear`."""
    return Work(
        name,
        2 * rows * linear.inputs * linear.outputs,
        weights=(linear.parameters if weights is None else weights) * form.bits / 8,
        moved=rows * (linear.inputs + linear.outputs) * form.activation_bytes,
        precision=form.precision,
    )


def _norms(dim: int, rows: int, form: Format) -> Work:
    """Two norms, each with its residual sum: three tensors read or written."""
    return Work("norms", moved=2 * 3 * rows * dim * form.activation_bytes, precision=form.activation, kernels=2)
