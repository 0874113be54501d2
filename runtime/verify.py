"""Replay a bundle's golden case on this machine's backends, and say which stage agrees with the reference.

The reference is the checkpoint itself, run by transformers at export. Each stage is judged alone: the vision graph from
the golden picture, the decoder's first step from the *golden* features, so that a fault shows where it is; then the
whole way, from the picture to the answer.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from svdprune.runtime.answer import Sight
from svdprune.runtime.positions import policy_named
from svdprune.runtime.verify_golden import Golden, read_golden
from svdprune.runtime.verify_metrics import (
    DECODER_LIMITS,
    VISION_LIMITS,
    DecoderLimits,
    VisionLimits,
    cosines,
    decoder_precision,
    kept_overlap,
    limits_for,
)
from svdprune.runtime.vlm import Vlm, load

Value = float | int | str


@dataclass(frozen=True)
class Stage:
    """One stage's verdict: what was measured, what was allowed (both by name), whether it passed, its seconds."""

    name: str
    measured: dict[str, Value]
    allowed: dict[str, Value]
    passed: bool
    seconds: float


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on a bundle.

    Attributes:
        bundle: its folder.
        vision, decoder: the backends' names.
        reference: number format of the reference run ("float32").
        stages: in the order of a request.
    """

    bundle: str
    vision: str
    decoder: str
    reference: str
    stages: list[Stage] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every stage is within its tolerance."""
        return all(stage.passed for stage in self.stages)

    @property
    def failed(self) -> list[str]:
        """Names of the stages that are not."""
        return [stage.name for stage in self.stages if not stage.passed]


def verify(
    bundle: str | Path,
    vision: str = "onnxruntime",
    decoder: str = "onnxruntime",
    threads: int | None = None,
    checkpoint: str | None = None,
) -> VerifyReport:
    """Replay the golden case.

    Args:
        bundle: the bundle's folder. vision, decoder, threads, checkpoint: as ``load`` takes them.

    Raises:
        BundleError: the bundle, or its golden case, is incomplete or changed.
        NumericalError: NaN or infinity on the way.
    """
    with load(bundle, vision, decoder, threads, checkpoint=checkpoint) as vlm:
        golden, manifest = read_golden(vlm.bundle), vlm.manifest
        vlm.positions = policy_named(golden.positions)
        exact = golden.reference == "float32"
        # A reference that was itself run in half precision cannot show float32 agreement.
        precision = manifest.vision.precision
        vision_limits = limits_for(VISION_LIMITS, "fp16" if precision == "fp32" and not exact else precision)
        decoder_limits = limits_for(DECODER_LIMITS, decoder_precision(manifest, decoder) if exact else "int4")
        report = VerifyReport(str(bundle), vision, decoder, golden.reference)
        began = time.perf_counter()
        sight = vlm.see(golden.picture)
        seconds = time.perf_counter() - began
        report.stages.append(kept_stage(sight.kept_indices, golden, vision_limits, seconds))
        report.stages.append(features_stage(sight.features, sight.places, golden, vision_limits, seconds))
        report.stages.append(logits_stage(vlm, sight, golden, decoder_limits))
        whole = decoder_limits.answer and exact and precision == "fp32"
        report.stages.append(_answer_stage(vlm, golden, whole))
    return report


def kept_stage(kept: np.ndarray, golden: Golden, limits: VisionLimits, seconds: float) -> Stage:
    """Judge the choice of tokens, int64 [K]; ``seconds`` is what the vision graph took."""
    overlap = kept_overlap(kept, golden.kept, golden.scores, limits.tie)
    same = int(np.isin(kept, golden.kept).sum())
    measured: dict[str, Value] = {"overlap": overlap, "identical": f"{same} of {len(kept)}"}
    return Stage("kept tokens", measured, {"overlap at least": limits.overlap}, overlap >= limits.overlap, seconds)


def features_stage(
    features: np.ndarray, places: np.ndarray, golden: Golden, limits: VisionLimits, seconds: float
) -> Stage:
    """Judge the features, float32 [K, H], of the rows that both keep, matched by their ``places`` int64 [K]."""
    _, ours, theirs = np.intersect1d(places, golden.places, assume_unique=True, return_indices=True)
    allowed: dict[str, Value] = {"cosine at least": limits.cosine}
    if not len(ours):
        return Stage("vision features", {"cosine": 0.0, "note": "no token in common"}, allowed, False, seconds)
    a, b = features[ours], golden.features[theirs]
    worst = float(cosines(a, b).min())
    measured: dict[str, Value] = {
        "cosine": worst,
        "max error": float(np.abs(a - b).max()),
        "largest feature": float(np.abs(b).max()),
    }
    return Stage("vision features", measured, allowed, worst >= limits.cosine, seconds)


def logits_stage(vlm: Vlm, sight: Sight, golden: Golden, limits: DecoderLimits) -> Stage:
    """Judge the decoder alone: the golden prompt with the golden features."""
    began = time.perf_counter()
    span = golden.span
    tiled = sight.tiled and dataclasses.replace(sight.tiled, places=span.kept, positions=span.positions)
    reference = dataclasses.replace(
        sight, features=golden.features, kept_indices=golden.kept, tiled=tiled, deepstack=golden.deepstack
    )
    logits = vlm.cached_prompt(reference).advance(golden.prompt_ids)
    seconds = time.perf_counter() - began
    cosine = float(cosines(logits[None], golden.logits[None])[0])
    best = int(golden.logits.argmax())
    rank = 1 + int((logits > logits[best]).sum())
    measured: dict[str, Value] = {
        "cosine": cosine,
        "max error": float(np.abs(logits - golden.logits).max()),
        "rank of the reference's best": rank,
    }
    allowed: dict[str, Value] = {"cosine at least": limits.cosine, "rank at most": limits.rank}
    return Stage("first-step logits", measured, allowed, cosine >= limits.cosine and rank <= limits.rank, seconds)


def _answer_stage(vlm: Vlm, golden: Golden, exact: bool) -> Stage:
    """From the picture to the answer. In reduced precision the words may differ, so they are shown and not judged."""
    began = time.perf_counter()
    length = max(1, len(golden.answer_ids) + golden.ended)  # with the end token, where there is one
    answer = vlm.ask(golden.picture, golden.question, max_new_tokens=length, temperature=0.0)
    seconds = time.perf_counter() - began
    same = answer.token_ids[: len(golden.answer_ids)] == golden.answer_ids
    same = same and (answer.stopped == "eos" or not golden.ended)
    measured: dict[str, Value] = {"answer": answer.text, "reference": golden.answer}
    allowed: dict[str, Value] = {"answer": "the reference's" if exact else "any: reduced precision"}
    return Stage("answer", measured, allowed, same or not exact, seconds)
