"""The vision graph of a bundle with its selection and without, on one backend: what ``profile`` runs in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from svdprune.runtime.engines.adapter import RUNTIMES
from svdprune.runtime.errors import UserError
from svdprune.runtime.ort import CPU, CUDA, open_session
from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.ort_layers import ort_layers
from svdprune.runtime.profile.runners import Feed, Runner, onnxrt_runner
from svdprune.runtime.unpruned import unpruned_graph
from svdprune.runtime.vlm import Vlm

PROVIDERS = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}
LayerTimes = Callable[[Feed, int, int], LayerTable]
"""Inputs, runs, warm-up runs -> the time of every layer."""


@dataclass(frozen=True)
class Graph:
    """A vision graph ready to run.

    Attributes:
        name: "pruned" or "unpruned".
        runner: takes ``pixels``, gives ``features`` [1, n, H] and, where pruned, ``kept_indices`` [1, n].
        tokens: n, the vision tokens that reach the decoder.
        layers: measures every layer; None where the backend cannot, and ``reason`` says why.
    """

    name: str
    runner: Runner
    tokens: int
    layers: LayerTimes | None = None
    reason: str = ""


def pruned_graph(vlm: Vlm, threads: int | None) -> Graph:
    """The bundle's own graph, run by the backend that ``vlm`` has opened."""
    info = vlm.manifest.vision
    name = vlm.vision.name
    if name in PROVIDERS:
        session = vlm.vision.session  # type: ignore[attr-defined]  # OnnxVision's
        runner = onnxrt_runner(session, "pruned")
        return Graph("pruned", runner, info.keep, *_ort_layers(name, vlm.bundle.file(info.file), threads))
    if name in RUNTIMES:
        from svdprune.runtime.profile.engines import pruned_engine

        return pruned_engine(vlm)
    raise UserError(f"the vision backend {name} cannot be profiled: choose one of {', '.join((*PROVIDERS, *RUNTIMES))}")


def whole_graph(vlm: Vlm, threads: int | None, folder: Path, stack: ExitStack) -> Graph:
    """The same graph without its selection, on the same backend.

    Args:
        folder: for the files that this takes; it must live as long as the graph.
        stack: closes what is opened here.

    Raises:
        BundleError: the selection cannot be taken out. MissingDependency: onnx is not installed.
        UserError: an engine of it cannot be built.
    """
    info = vlm.manifest.vision
    path = unpruned_graph(vlm.bundle.file(info.file), folder / "unpruned.onnx")
    name = vlm.vision.name
    if name in PROVIDERS:
        runner = onnxrt_runner(open_session(path, threads, PROVIDERS[name]), "unpruned")
        return Graph("unpruned", runner, info.tokens, *_ort_layers(name, path, threads))
    from svdprune.runtime.profile.engines import unpruned_engine

    return unpruned_engine(vlm, path, stack)


def kept_of(graph: Graph, outputs: dict[str, np.ndarray]) -> np.ndarray:
    """Indices int64 [n] of the tokens whose features a graph gave."""
    kept: np.ndarray = outputs["kept_indices"][0] if "kept_indices" in outputs else np.arange(graph.tokens)
    return kept


def _ort_layers(name: str, path: Path, threads: int | None) -> tuple[LayerTimes | None, str]:
    if name != "onnxruntime":
        return None, "ONNX Runtime times the launch of a GPU's kernels, not the kernels: no time of single layers"
    return partial(_layers_of, path, threads), ""


def _layers_of(path: Path, threads: int | None, feed: Feed, runs: int, warm_up: int) -> LayerTable:
    return ort_layers(path, feed, threads, runs, warm_up)
