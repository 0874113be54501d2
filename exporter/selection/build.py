"""A selector as a torch module and as an ONNX graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from svdprune.exporter.selection.config import SelectorConfig
from svdprune.exporter.selection.ops import OPSET, OnnxOps, TorchOps
from svdprune.exporter.selection.registry import Task, selector_entry, selector_names
from svdprune.runtime.errors import UserError


class Selector(nn.Module):
    """Scores (B, T) float32 of features (B, T, D) of any floating type; no weights, no gradient."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    @torch.no_grad()
    def forward(self, features: torch.Tensor, cls_attention: torch.Tensor | None = None) -> torch.Tensor:
        """features (B, T, D), cls_attention (B, T) where the selector needs it -> scores (B, T) float32.

        Scores of a picture whose features hold NaN or infinity are NaN.
        """
        task, entry = self.task, selector_entry(self.task.config.name)
        if features.shape[1:] != (task.tokens, task.channels):
            raise ValueError(f"features {tuple(features.shape)} are not (B, {task.tokens}, {task.channels})")
        if not entry.needs_cls_attention:
            cls_attention = None
        elif cls_attention is None:
            raise UserError(f"the selector `{task.config.name}` needs the [CLS] attention, which was not given")
        attention = None if cls_attention is None else cls_attention.float()
        scores: torch.Tensor = entry.scorer(TorchOps(features.device), features.float(), attention, task)
        return scores


def build_selector(
    config: SelectorConfig,
    tokens: int,
    channels: int,
    *,
    grid: tuple[int, int] | None = None,
    keep: int | None = None,
    start: np.ndarray | None = None,
    padded: bool = False,
    gpu: bool = False,
) -> Selector:
    """The torch form, for features of `tokens` x `channels`.

    Args:
        grid: (rows, columns) of the patches, which `grid` needs.
        keep: K, which `grid` and `maxmin` need.
        start: calibrated start of `leverage`, (D, b or more), from `svdprune.calib.start`; None for the seeded one.
        padded: some of the T tokens may be rows of zeros that stand for nothing.
        gpu: the form with few kernels one after another instead of the one with little arithmetic; their scores are
            the same but for rounding.
    """
    task = Task(config, tokens, channels, grid, keep, start, padded, gpu)
    _check(task)
    return Selector(task)


def selector_model(
    config: SelectorConfig,
    tokens: int,
    channels: int,
    *,
    grid: tuple[int, int] | None = None,
    keep: int | None = None,
    start: np.ndarray | None = None,
    padded: bool = False,
    gpu: bool = False,
) -> ir.Model:
    """The ONNX form of the same operations, opset 18; arguments as of `build_selector`.

    Inputs `tokens_in` float32 (B, T, D) and, for a selector that needs it, `cls_attention` float32 (B, T); output
    `scores` float32 (B, T); B is free.
    """
    task = Task(config, tokens, channels, grid, keep, start, padded, gpu)
    _check(task)
    entry = selector_entry(config.name)
    features = _float("tokens_in", ["batch", tokens, channels])
    inputs = [features]
    if entry.needs_cls_attention:
        inputs.append(_float("cls_attention", ["batch", tokens]))
    op = OnnxOps()
    scores: ir.Value = entry.scorer(op, features, inputs[1] if entry.needs_cls_attention else None, task)
    scores.name, scores.dtype, scores.shape = "scores", ir.DataType.FLOAT, ir.Shape(["batch", tokens])
    graph = ir.Graph(
        inputs, [scores], nodes=op.nodes, initializers=op.initializers, opset_imports={"": OPSET}, name="selector"
    )
    return ir.Model(graph, ir_version=10, producer_name="svdprune")


def _float(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _check(task: Task) -> None:
    if task.padded and not selector_entry(task.config.name).padding:
        able = ", ".join(name for name in selector_names() if selector_entry(name).padding)
        raise UserError(
            f"the selector `{task.config.name}` needs a picture of a fixed number of tokens, and this model's vary: "
            f"choose from {able}"
        )
    task.config.check(tokens=task.tokens, channels=task.channels, keep=task.tokens if task.keep is None else task.keep)
