"""How far a quantised graph is from the float one it was made from, picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from svdprune.calib.quantise.sites import TOKENS
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.lazy import require
from svdprune.runtime.ort import ort_errors
from svdprune.runtime.tiling.feed import Prepared
from svdprune.runtime.tiling.slots import chosen


@dataclass(frozen=True)
class Seen:
    """What a graph gives for one picture: tokens at the tap (T, D), features (K, H), kept indices (K,), scores (T,).

    Of a picture in tiles: the tokens of all tiles, and the features, indices and scores of its candidates. `deepstack`
    (L, K, H) where the graph gives it.
    """

    tokens: np.ndarray
    features: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    deepstack: np.ndarray | None = None


@dataclass(frozen=True)
class Change:
    """What quantisation changed, over some pictures.

    Attributes:
        cosine: of a token at the tap with the float graph's, mean over tokens and pictures.
        worst_cosine: the picture whose mean is the lowest.
        overlap: share of the kept tokens that the float graph keeps, mean over pictures. worst_overlap: the lowest.
        scores: share of the scores' sum that moved from one token to another, mean over pictures.
    """

    cosine: float
    worst_cosine: float
    overlap: float
    worst_overlap: float
    scores: float


class Judge:
    """The float graph's outputs on some pictures, to hold others against.

    Args:
        graph: the float graph. pictures: its inputs for each.
        threads: of ONNX Runtime, None for all.
        as_run: whether quantised graphs run as the runtime runs them, with ONNX Runtime's integer kernels; otherwise
            each Q, DQ and product is computed as it is written, which is what an engine with exact 8-bit products does.
    """

    def __init__(
        self, graph: Path, pictures: Sequence[Prepared], threads: int | None = None, as_run: bool = False
    ) -> None:
        self.pictures, self.threads, self.as_run = list(pictures), threads, as_run
        self.reference = self.see(graph)

    def see(self, graph: Path) -> list[Seen]:
        """Run a graph on the pictures."""
        model = onnx.load(str(graph), load_external_data=False)
        if TOKENS not in {output.name for output in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=TOKENS))
        place = graph.with_name(f"{graph.stem}-judged.onnx")
        place.write_bytes(model.SerializeToString())
        try:
            session = open_quantised(place, self.threads, self.as_run)
        finally:
            place.unlink()
        names = [output.name for output in session.get_outputs()]
        return [
            seen_of(picture, dict(zip(names, session.run(names, picture.inputs), strict=True)))
            for picture in self.pictures
        ]

    def change(self, graph: Path) -> Change:
        """How far a graph is from the reference."""
        return compare(self.see(graph), self.reference)


def seen_of(picture: Prepared, outputs: Mapping[str, np.ndarray]) -> Seen:
    """One picture's outputs, `tokens` among them or none of those; empty slots of tiles are left out."""
    tokens, deep = outputs.get(TOKENS, np.zeros((0, 1))).astype(np.float32), outputs.get("deepstack")
    features, kept, scores = (outputs[name] for name in ("features", "kept_indices", "scores"))
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if picture.cut is None or picture.slots is None:
        return Seen(tokens, features[0], kept[0], scores[0], None if deep is None else deep[0])
    found = chosen(picture.slots, features, kept, scores, len(picture.cut.places), deep)
    return Seen(tokens, found.features, found.kept, found.scores, found.deepstack)


def open_quantised(graph: Path, threads: int | None, as_run: bool) -> Any:
    """An ONNX Runtime session on the CPU. Arguments as of `Judge`.

    Raises:
        SvdpruneError: this ONNX Runtime lacks a kernel.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not as_run:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise SvdpruneError(
            f"onnxruntime {onnxruntime.__version__} cannot run the quantised graph ({error}): upgrade onnxruntime"
        ) from error


def compare(seen: Sequence[Seen], reference: Sequence[Seen]) -> Change:
    """The change from `reference` to `seen`, picture by picture."""
    cosines, overlaps, moved = [], [], []
    for ours, theirs in zip(seen, reference, strict=True):
        a, b = ours.tokens.astype(np.float64), theirs.tokens.astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(float(np.mean((a * b).sum(1) / np.where(norms > 0, norms, 1.0))))
        overlaps.append(float(np.isin(ours.kept, theirs.kept).mean()))
        total = float(np.abs(theirs.scores).sum()) or 1.0
        moved.append(float(np.abs(ours.scores - theirs.scores).sum()) / (2 * total))
    return Change(float(np.mean(cosines)), min(cosines), float(np.mean(overlaps)), min(overlaps), float(np.mean(moved)))
