"""The pruned vision graph: normalise, encoder up to the tap, scorer, top K, gather, projector.

The encoder and the projector are traced by torch; the scorer is authored (`selection`); this module joins
them. The projector comes after the gather, so it sees K rows instead of T.

Names of nodes tell the parts apart, for profiles and for whoever reads a graph: `scorer/...`, `select/...` (top K and
gather) and `projector/...`; what has none of these is the encoder's. A traced node is named for the module it came
from, as in `encoder.layers.3.self_attn.q_proj/MatMul_60`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.graft import graft
from svdprune.exporter.selection import SelectorConfig, selector_model
from svdprune.exporter.tiled import candidates, joined, kept_levels, kept_rows, mask_scores
from svdprune.exporter.tracing import traced

EXTERNAL_ABOVE = 64 << 20  # bytes of weights beyond which they go into a file of their own, written piece by piece
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Normalised(nn.Module):
    """Raw pixels in, tokens out: rescale, subtract the mean, divide by the deviation, then the encoder."""

    def __init__(self, encoder: nn.Module, spec: VisionSpec, raw: bool, attention: bool):
        super().__init__()
        self.encoder, self.raw, self.attention = encoder, raw, attention
        self.dtype = next(encoder.parameters()).dtype
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", (spec.rescale / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor, *extras: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 (B, height, width, 3) or, when not `raw`, normalised float32 (B, 3, height, width); and the extras."""
        if self.raw:
            # The cast comes first: TensorRT takes uint8 at a network's input and for a Cast, nowhere else.
            pixels = pixels.float().permute(0, 3, 1, 2) * self.scale - self.shift
        tokens, attention, *levels = self.encoder(pixels.to(self.dtype), *extras)
        return (tokens, *([attention.float()] if self.attention else []), *levels)


def build_vision(
    checkpoint: Checkpoint,
    family: Family,
    spec: VisionSpec,
    selector: SelectorConfig,
    keep: int,
    *,
    precision: str = "fp32",
    raw: bool = True,
    start: np.ndarray | None = None,
    gpu: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> ir.Model:
    """The whole graph, batch dynamic, opset 18.

    Input `pixels` uint8 (B, height, width, 3), or float32 (B, 3, height, width) with `raw` false.
    Outputs `features` float32 (B, K, H), `kept_indices` int64 (B, K) ascending, `scores` float32 (B, T).
    A family that cuts pictures into tiles has B = N tiles, its `extras` and the inputs of `tiled`; in its outputs B is
    G choices. One with DeepStack has the output `deepstack` float32 (G, L, K, H) as well.
    `precision` is the encoder's and the projector's; the scorer is always float32, in the form for a GPU with `gpu`.
    Reads the vision tower's and the projector's weights, nothing else of the checkpoint.
    """
    dtype = DTYPES[precision]
    report("tracing the vision encoder")
    part: Any = family.encoder(checkpoint).to(dtype)
    if hasattr(part, "pictures"):
        part.pictures = spec.pictures
    encoder = Normalised(part, spec, raw, selector.needs_cls_attention)
    shape = (2, spec.height, spec.width, 3) if raw else (2, 3, spec.height, spec.width)
    pixels = torch.zeros(shape, dtype=torch.uint8 if raw else torch.float32)
    outputs = ["tokens", *(["cls_attention"] if selector.needs_cls_attention else [])]
    outputs += ["levels"] if spec.deepstack else []
    extras = {name: torch.zeros(2, *rest) for name, rest in spec.extras.items()}
    model = traced(encoder, {"pixels": pixels, **extras}, outputs)
    del encoder, part
    if raw:
        _cast_first(model)
    report("adding the scorer")
    tokens, *attention = model.graph.outputs
    levels = attention.pop() if spec.deepstack else None
    model.graph.outputs.clear()
    tape = ir.tape.Tape(model.graph)
    tiles = spec.tiles()
    found = candidates(model, tokens, attention[0] if attention else None, spec) if tiles is not None else None
    if found is not None:
        wide, attention = found.rows, [found.attention] if found.attention is not None else []
    else:
        wide = (
            tokens
            if dtype == torch.float32
            else tape.op("Cast", [tokens], {"to": ir.DataType.FLOAT}, name="scorer/widen")
        )
    scorer = selector_model(
        selector,
        tokens=spec.tokens,
        channels=spec.channels,
        grid=spec.selection_grid,
        keep=keep,
        start=start,
        padded=found is not None,
        gpu=gpu,
    )
    given = dict(zip(("tokens_in", "cls_attention"), (wide, *attention), strict=False))
    scores = graft(model, scorer, {str(v.name): given[str(v.name)] for v in scorer.graph.inputs}, "scorer")["scores"]
    if found is not None:
        scores = mask_scores(model, scores, found)
    kept, column = _top(model, scores, keep, spec.tokens)
    if found is not None:
        rows, weights = kept_rows(model, found, column)
    else:
        rows = (
            tokens
            if column is None
            else ir.tape.Tape(model.graph).op("GatherND", [tokens, column], {"batch_dims": 1}, name="select/gather")
        )
    report("tracing the projector")
    projector = traced(
        family.projector(checkpoint).to(dtype),
        {"rows": torch.zeros(2, keep * (1 if tiles is None else tiles.sources), spec.channels, dtype=dtype)},
        ["features"],
    )
    features = graft(model, projector, {"rows": rows}, "projector")["features"]
    if dtype != torch.float32:
        features = ir.tape.Tape(model.graph).op("Cast", [features], {"to": ir.DataType.FLOAT}, name="projector/widen")
    if tiles is not None:
        features = joined(model, features, weights, tiles.sources, spec.hidden)
    deepstack = None
    if levels is not None and found is not None:
        report("tracing the mergers of the levels")
        rows = kept_levels(model, found, levels, spec.deepstack * spec.channels, column)
        deepstack = _deepstack(model, checkpoint, family, spec, rows, keep, dtype)
    _declare(model, features, kept, scores, deepstack, keep, spec)
    return model


def _deepstack(
    model: ir.Model,
    checkpoint: Checkpoint,
    family: Family,
    spec: VisionSpec,
    rows: ir.Value,
    keep: int,
    dtype: torch.dtype,
) -> ir.Value:
    """Levels float32 (G, L, K, H) from those of the kept tokens (G, K, L * D)."""
    mergers = family.deepstack(checkpoint)
    assert mergers is not None  # the spec says that there are levels
    width = spec.deepstack * spec.channels
    part = traced(mergers.to(dtype), {"rows": torch.zeros(2, keep, width, dtype=dtype)}, ["deepstack"])
    made = graft(model, part, {"rows": rows}, "projector/deepstack")["deepstack"]
    if dtype == torch.float32:
        return made
    return ir.tape.Tape(model.graph).op("Cast", [made], {"to": ir.DataType.FLOAT}, name="projector/widen_deepstack")


def _cast_first(model: ir.Model) -> None:
    """Leave the bytes to the Cast alone: the tracer asks their Shape, which TensorRT's table does not grant uint8."""
    pixels = model.graph.inputs[0]
    cast = next(node for node, _ in pixels.uses() if node.op_type == "Cast")
    model.graph.remove(cast)
    model.graph.insert_before(model.graph[0], cast)
    for node, position in tuple(pixels.uses()):
        if node is not cast:
            node.replace_input_with(position, cast.outputs[0])


def _top(model: ir.Model, scores: ir.Value, keep: int, total: int) -> tuple[ir.Value, ir.Value | None]:
    """Indices of the K largest scores, ascending, int64 (B, K), and as a column (B, K, 1); None for all of them."""
    tape = ir.tape.Tape(model.graph)

    def constant(name: str, value: np.ndarray) -> ir.Value:
        return tape.initializer(ir.tensor(value), name=f"select/{name}")

    if keep == total:  # nothing to choose: also spares engines whose TopK has a limit
        batch = tape.op("Shape", [scores], {"start": 0, "end": 1}, name="select/batch")
        shape = tape.op("Concat", [batch, constant("total", np.array([total]))], {"axis": 0}, name="select/shape")
        return tape.op("Expand", [constant("all", np.arange(total)[None]), shape], name="select/everything"), None
    k = constant("k", np.array([keep]))
    best = tape.op_multi_out(
        "TopK", [scores, k], {"axis": 1, "largest": 1, "sorted": 1}, num_outputs=2, name="select/top"
    )[1]
    # Sorted again by place. Through float, exact for any count of tokens: older engines sort no integers.
    place = tape.op("Cast", [best], {"to": ir.DataType.FLOAT}, name="select/place")
    ordered = tape.op_multi_out(
        "TopK", [place, k], {"axis": 1, "largest": 0, "sorted": 1}, num_outputs=2, name="select/order"
    )[0]
    kept = tape.op("Cast", [ordered], {"to": ir.DataType.INT64}, name="select/kept")
    column = tape.op("Unsqueeze", [kept, constant("last", np.array([2]))], name="select/column")
    return kept, column


def _declare(
    model: ir.Model,
    features: ir.Value,
    kept: ir.Value,
    scores: ir.Value,
    deepstack: ir.Value | None,
    keep: int,
    spec: VisionSpec,
) -> None:
    """Name and shape the outputs as every user of the graph expects them."""
    choices = next((v for v in model.graph.inputs if v.name == "sources"), model.graph.inputs[0])
    batch = choices.shape[0]  # type: ignore[index]  # a picture each, or the G of `sources`
    tape = ir.tape.Tape(model.graph)
    levels = [] if deepstack is None else [deepstack]
    for name, value, dtype, rest in (
        ("features", features, ir.DataType.FLOAT, (keep, spec.hidden)),
        ("kept_indices", kept, ir.DataType.INT64, (keep,)),
        ("scores", scores, ir.DataType.FLOAT, (spec.tokens,)),
        *(("deepstack", level, ir.DataType.FLOAT, (spec.deepstack, keep, spec.hidden)) for level in levels),
    ):
        shared = value.producer() is None or value in model.graph.outputs
        out = tape.op("Identity", [value], name=f"outputs/{name}") if shared else value
        out.name, out.dtype, out.shape = name, dtype, ir.Shape([batch, *rest])
        model.graph.outputs.append(out)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph (and `<name>.data` beside it when it is large), then check it with full shape inference."""
    model.producer_name = "svdprune"
    model.ir_version = min(model.ir_version, 10)  # what TensorRT 10.3's parser and older runtimes read
    weight = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if weight > EXTERNAL_ABOVE else None)
    onnx.checker.check_model(str(path), full_check=True)
