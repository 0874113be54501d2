"""Replay a bundle's golden case on this machine's backends, and say which stage agrees with the reference.

The reference is the checkpoint itself, run by transformers at export. Each stage is judged alone: the vision graph from
the golden picture, the decoder's first step from the *golden* features, so that a fault shows where it is; then the
whole way, from the picture to the answer.
"""

from __future__ import annotations

import dataclasses
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.answer import Sight
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.vlm import Vlm, load

Value = float | int | str


@dataclass(frozen=True)
class VisionLimits:
    """What the vision stage may differ by.

    Attributes:
        cosine: least cosine of any kept token's features with the reference's.
        overlap: least share of kept tokens that the reference keeps, too.
        tie: scores closer than this share of the lowest kept one count as equal, and either token as kept.
    """

    cosine: float
    overlap: float
    tie: float


@dataclass(frozen=True)
class DecoderLimits:
    """What the first step's logits may differ by.

    Attributes:
        cosine: least cosine of the logits.
        rank: the reference's best token is among this many best.
        answer: whether the answer must be the reference's token for token.
    """

    cosine: float
    rank: int
    answer: bool


VISION_LIMITS = {"fp32": VisionLimits(0.9999, 1.0, 1e-3), "fp16": VisionLimits(0.995, 0.9, 1e-2)}
DECODER_LIMITS = {"fp32": DecoderLimits(0.9999, 1, True), "int4": DecoderLimits(0.95, 3, False)}


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


@dataclass(frozen=True)
class Golden:
    """The golden case: ids of the prompt and the answer, float32 features [K, H], scores [T], logits [V].

    ``ended`` tells that the model itself ended the answer there, so that going on is a fault, too.
    """

    picture: Path
    question: str
    prompt_ids: list[int]
    answer: str
    answer_ids: list[int]
    positions: str
    ended: bool
    reference: str
    kept: np.ndarray
    features: np.ndarray
    scores: np.ndarray
    logits: np.ndarray


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
    vlm = load(bundle, vision, decoder, threads, checkpoint=checkpoint)
    golden = read_golden(vlm.bundle)
    if golden.positions != vlm.positions:
        vlm = load(bundle, vision, decoder, threads, golden.positions, verify=False, checkpoint=checkpoint)
    exact = golden.reference == "float32"
    manifest = vlm.manifest
    # A reference that was itself run in half precision cannot show float32 agreement.
    vision_limits = _limits(VISION_LIMITS, manifest.vision.precision if exact else "fp16")
    decoder_limits = _limits(DECODER_LIMITS, manifest.decoder.precision if exact else "int4")
    report = VerifyReport(str(bundle), vision, decoder, golden.reference)
    began = time.perf_counter()
    sight = vlm.see(golden.picture)
    seconds = time.perf_counter() - began
    report.stages.append(_kept_stage(sight.kept_indices, golden, vision_limits, seconds))
    report.stages.append(_features_stage(sight.features, sight.kept_indices, golden, vision_limits, seconds))
    report.stages.append(_logits_stage(vlm, sight, golden, decoder_limits))
    whole = decoder_limits.answer and exact and manifest.vision.precision == "fp32"
    report.stages.append(_answer_stage(vlm, golden, whole))
    return report


def read_golden(bundle: Bundle) -> Golden:
    """The golden case of an opened bundle.

    Raises:
        BundleError: it cannot be read, lacks a part, or does not fit the manifest.
    """
    names, info = bundle.manifest.golden, bundle.manifest
    case = bundle.read_json(names.case)
    path = bundle.file(names.arrays)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, scores, logits = (np.asarray(arrays[name]) for name in ("features", "scores", "logits"))
        golden = Golden(
            picture=bundle.file(names.image),
            question=case["question"],
            prompt_ids=[int(token) for token in case["prompt_ids"]],
            answer=case["answer"],
            answer_ids=[int(token) for token in case["answer_ids"]],
            positions=case["positions"],
            ended=case.get("stopped") == "eos",
            reference=case.get("dtype", "float32"),
            kept=np.asarray(case["kept_indices"], np.int64),
            features=features,
            scores=scores,
            logits=logits,
        )
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} or its case cannot be read ({error}): export the bundle again") from error
    vision, decoder = info.vision, info.decoder
    for name, array, shape in (
        ("features", golden.features, (vision.keep, vision.hidden)),
        ("scores", golden.scores, (vision.tokens,)),
        ("logits", golden.logits, (decoder.vocab,)),
        ("kept_indices", golden.kept, (vision.keep,)),
    ):
        if array.shape != shape:
            raise BundleError(f"{path}: {name} is {list(array.shape)}, not {list(shape)}: export the bundle again")
    return golden


def kept_overlap(kept: np.ndarray, reference: np.ndarray, scores: np.ndarray, tie: float) -> float:
    """Share of the tokens ``kept`` int [K] that the reference keeps, or that tie with its last one.

    Two tokens whose scores differ in the last digits may swap from one machine to the next; that harms nothing.

    Args:
        kept, reference: indices.
        scores: float [T], the reference's.
        tie: a token counts when its score is at least (1 - tie) times the lowest score in ``reference``.
    """
    lowest = scores[reference].min()
    fits = np.isin(kept, reference) | (scores[kept] >= lowest - tie * abs(lowest))
    return float(fits.mean())


def cosines(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cosine of each row of two arrays [n, H], float64 [n]; 0 where a row is zero, 1 where both are."""
    a, b = rows.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0))


def _limits(table: dict[str, Any], precision: str) -> Any:
    if precision not in table:
        raise BundleError(f"no tolerance is known for the precision {precision}: upgrade svdprune")
    return table[precision]


def _kept_stage(kept: np.ndarray, golden: Golden, limits: VisionLimits, seconds: float) -> Stage:
    overlap = kept_overlap(kept, golden.kept, golden.scores, limits.tie)
    same = int(np.isin(kept, golden.kept).sum())
    measured: dict[str, Value] = {"overlap": overlap, "identical": f"{same} of {len(kept)}"}
    return Stage("kept tokens", measured, {"overlap at least": limits.overlap}, overlap >= limits.overlap, seconds)


def _features_stage(
    features: np.ndarray, kept: np.ndarray, golden: Golden, limits: VisionLimits, seconds: float
) -> Stage:
    """Features of the tokens that both keep, matched by index."""
    _, ours, theirs = np.intersect1d(kept, golden.kept, assume_unique=True, return_indices=True)
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


def _logits_stage(vlm: Vlm, sight: Sight, golden: Golden, limits: DecoderLimits) -> Stage:
    """The decoder alone: the golden prompt with the golden features."""
    began = time.perf_counter()
    reference = dataclasses.replace(sight, features=golden.features, kept_indices=golden.kept)
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
