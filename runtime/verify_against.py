"""Compare what two backends, or two bundles of one model, compute, by Polygraphy's comparator and the kept set.

Both see the golden picture. Both decoders then get the same rows - the golden prompt with the golden features, and the
golden answer token by token - so that neither's choices lead it astray. Features are compared for the tokens that both
keep: which those are is a measure of its own, since near ties swap tokens harmlessly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.arrays import host_rows
from svdprune.runtime.bundle import Bundle, open_bundle
from svdprune.runtime.decoder import BACKENDS as DECODERS
from svdprune.runtime.decoder import more_inputs, open_decoder
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderInfo
from svdprune.runtime.positions import policy_named
from svdprune.runtime.preprocess import ImageSettings
from svdprune.runtime.profile.runners import Call, CallRunner, Feed, inputs_of, polygraphy, quiet
from svdprune.runtime.prompt import Run, layout_of, run_of
from svdprune.runtime.tiling.feed import prepare, slots_of
from svdprune.runtime.verify_compare import Difference, Value, differences
from svdprune.runtime.verify_golden import Golden, read_golden
from svdprune.runtime.verify_metrics import (
    DECODER_LIMITS,
    VISION_LIMITS,
    Limits,
    decoder_precision,
    kept_overlap,
    limits_for,
)
from svdprune.runtime.vision import BACKENDS as VISIONS
from svdprune.runtime.vision import open_vision

REFERENCE = "onnxruntime"  # the backend that runs another bundle


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a bundle, and a backend for each part; None for a part that it does not run."""

    bundle: Bundle
    vision: str | None
    decoder: str | None
    threads: int | None = None
    checkpoint: str | None = None

    def describe(self, other: Side, parts: list[str]) -> str:
        """The backend of each part, and the bundle where it is another than the other side's."""
        backends = ", ".join(f"{part} by {getattr(self, part)}" for part in parts)
        return backends if self.bundle.path == other.bundle.path else f"{self.bundle.path}, {backends}"


@dataclass(frozen=True)
class Against:
    """The verdict of a comparison. ``ours`` and ``theirs`` say what was compared; parts that one side lacks are not."""

    ours: str
    theirs: str
    differences: list[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(difference.passed for difference in self.differences)

    @property
    def failed(self) -> list[str]:
        """Names of the outputs that are not."""
        return [difference.output for difference in self.differences if not difference.passed]


def verify_against(
    bundle: str | Path,
    against: str,
    vision: str = "onnxruntime",
    decoder: str = "onnxruntime",
    threads: int | None = None,
    checkpoint: str | None = None,
    verify: bool = True,
) -> Against:
    """Compare a bundle's backends with another backend, or with another bundle of the same model on ONNX Runtime.

    Args:
        bundle, vision, decoder, threads, checkpoint: as ``load`` takes them.
        against: a backend's name, for the parts that it can run, or a bundle's folder.
        verify: compare the SHA-256 of every file of the bundles first.

    Raises:
        UserError: ``against`` is neither, the bundles are not of one model, or a backend is not available.
        BundleError: a bundle, or the golden case, is incomplete or changed. NumericalError: NaN or infinity.
        MissingDependency: Polygraphy is not installed.
    """
    opened = open_bundle(bundle, verify)
    ours = Side(opened, vision, decoder, threads, checkpoint if decoder == "transformers" else None)
    theirs = _other_side(ours, against, checkpoint, verify)
    if checkpoint is not None and "transformers" not in (ours.decoder, theirs.decoder):
        raise UserError("--checkpoint is for the decoder transformers, which is on neither side: leave it out")
    golden = read_golden(opened)
    found: list[Difference] = []
    with quiet():
        if theirs.vision is not None:
            found += _compare_vision(ours, theirs, golden)
        if theirs.decoder is not None:
            found += _compare_decoders(ours, theirs, golden)
    parts = [part for part in ("vision", "decoder") if getattr(theirs, part) is not None]
    return Against(ours.describe(theirs, parts), theirs.describe(ours, parts), found)


def _other_side(ours: Side, against: str, checkpoint: str | None, verify: bool) -> Side:
    visions, decoders = VISIONS.names(), DECODERS.names()
    if against in visions or against in decoders:
        return Side(
            ours.bundle,
            against if against in visions else None,
            against if against in decoders else None,
            ours.threads,
            checkpoint if against == "transformers" else None,
        )
    if not Path(against).is_dir():
        known = ", ".join(dict.fromkeys([*visions, *decoders]))
        raise UserError(f"--against {against} is neither a bundle's folder nor a backend: choose one of {known}")
    theirs = Side(open_bundle(against, verify), REFERENCE, REFERENCE, ours.threads)
    _check_same_model(ours.bundle, theirs.bundle)
    return theirs


def _check_same_model(ours: Bundle, theirs: Bundle) -> None:
    a, b = ours.manifest, theirs.manifest
    for what, mine, other in (
        ("model", a.model.id, b.model.id),
        ("weights, by SHA-256", str(a.model.sha256)[:12], str(b.model.sha256)[:12]),
        ("vision tokens", a.vision.tokens, b.vision.tokens),
        ("tiles", a.vision.tiles, b.vision.tiles),
        ("kept tokens", a.vision.keep, b.vision.keep),
        ("pixels", a.vision.input, b.vision.input),
        ("height", a.vision.height, b.vision.height),
        ("width", a.vision.width, b.vision.width),
        ("hidden size", a.decoder.hidden, b.decoder.hidden),
        ("vocabulary", a.decoder.vocab, b.decoder.vocab),
    ):
        if mine != other:
            raise UserError(
                f"{ours.path} and {theirs.path} differ in {what} ({mine} and {other}): "
                "give two exports of one model with the same --keep"
            )


# ---- vision --------------------------------------------------------------------------------------------------------


def _compare_vision(ours: Side, theirs: Side, golden: Golden) -> list[Difference]:
    limits = _looser(*(limits_for(VISION_LIMITS, side.bundle.manifest.vision.precision) for side in (ours, theirs)))
    name = ours.bundle.manifest.processor.image
    settings = ImageSettings.from_json(ours.bundle.read_json(name), name)
    feed = prepare(golden.picture, settings, ours.bundle.manifest).inputs
    first, second = (_flat(run[0]) for run in _run(ours, theirs, "vision", [feed]))
    kept, other, scores = first["kept_indices"][0], second["kept_indices"][0], second["scores"][0]
    _, a, b = np.intersect1d(kept, other, assume_unique=True, return_indices=True)
    overlap = kept_overlap(kept, other, scores, limits.tie)
    measured: dict[str, Value] = {"overlap": overlap, "identical": f"{len(a)} of {len(kept)}"}
    allowed: dict[str, Value] = {"overlap at least": limits.overlap}
    found = [
        Difference("kept_indices", 1, measured, allowed, overlap >= limits.overlap),
        differences("scores", [first["scores"]], [second["scores"]], limits.cosine),
    ]
    if len(a):
        x, y = first["features"][:, a], second["features"][:, b]
        return [*found, differences("features", [x], [y], limits.cosine, rows=True)]
    note: dict[str, Value] = {"note": "no token in common"}
    return [*found, Difference("features", 1, note, {"cosine at least": limits.cosine}, False)]


def _flat(output: Feed) -> Feed:
    """Several choices of one picture, which are its tiles', as one: indices count on from choice to choice."""
    features, kept, scores = (output[name] for name in ("features", "kept_indices", "scores"))
    numbers = kept + scores.shape[1] * np.arange(len(kept))[:, None]
    return {
        "features": features.reshape(1, -1, features.shape[2]),
        "kept_indices": numbers.reshape(1, -1),
        "scores": scores.reshape(1, -1),
    }


@contextmanager
def _vision(side: Side) -> Iterator[Call]:
    assert side.vision is not None
    backend = open_vision(side.vision, side.bundle, side.threads)
    try:
        yield lambda feed: _arrays(backend.encode(feed["pixels"], slots=slots_of(feed)))
    finally:
        backend.close()


def _arrays(output: Any) -> Feed:
    """The three arrays of a ``VisionOutput``, on the host."""
    return {name: getattr(output, name) for name in ("features", "kept_indices", "scores")}


# ---- decoder -------------------------------------------------------------------------------------------------------


def _compare_decoders(ours: Side, theirs: Side, golden: Golden) -> list[Difference]:
    precisions = (decoder_precision(side.bundle.manifest, side.decoder or "") for side in (ours, theirs))
    limits = _looser(*(limits_for(DECODER_LIMITS, precision) for precision in precisions))
    first, second = _run(ours, theirs, "decoder", _steps(ours.bundle, golden))
    a, b = ([step["logits"] for step in run] for run in (first, second))
    return [differences("logits", a, b, limits.cosine, rank=limits.rank)]


def _steps(bundle: Bundle, golden: Golden) -> list[Feed]:
    """Rows and positions of the golden prompt, then of each token of the golden answer."""
    manifest = bundle.manifest
    info = manifest.decoder
    embed = Embedding(bundle.file(info.embedding), info.vocab, info.hidden, info.embed_scale)
    ids = golden.prompt_ids
    pictures, policy = [golden.pictured], policy_named(golden.positions)
    layout = layout_of(ids, pictures, policy, info, manifest.processor.image_token_id)
    runs = [run_of(layout, ids, 0, pictures, embed)]
    for number, token in enumerate(golden.answer_ids, len(ids)):
        runs.append(Run(embed([token]), layout.span(number, number + 1)))
    return [_step(run, info) for run in runs]


def _step(run: Run, info: DecoderInfo) -> Feed:
    """The arguments of ``DecoderState.append`` as inputs by name; levels and groups where the decoder has them."""
    rows = host_rows(run.embeds)
    feed = {"rows": rows, "positions": run.positions}
    for name, array in more_inputs(info, len(rows), run.deepstack, run.groups).items():
        feed[name] = array[:, 0] if name == "deepstack" else array[0]
    return {name: np.ascontiguousarray(array) for name, array in feed.items()}


@contextmanager
def _decoder(side: Side) -> Iterator[Call]:
    assert side.decoder is not None
    decoder = open_decoder(side.decoder, side.bundle, side.threads, side.checkpoint)
    try:
        state = decoder.start()
        yield lambda feed: {
            "logits": state.append(feed["rows"], feed["positions"], feed.get("deepstack"), feed.get("groups"))[None]
        }
    finally:
        decoder.close()


# ---- both ----------------------------------------------------------------------------------------------------------


def _run(ours: Side, theirs: Side, part: str, feeds: list[Feed]) -> list[list[Any]]:
    """Both sides one after the other in Polygraphy's comparator; of each, the outputs of every feed."""
    hidden = ours.bundle.manifest.decoder.hidden
    inputs: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]
    if part == "vision":
        opened, inputs = _vision, inputs_of(ours.bundle.manifest.vision)
    else:
        numbers, whole = np.dtype(np.float32), np.dtype(np.int64)
        info = ours.bundle.manifest.decoder
        axes: tuple[int | None, ...] = (None,) if info.position_axes == 1 else (info.position_axes, None)
        opened, inputs = _decoder, {"rows": ((None, hidden), numbers), "positions": (axes, whole)}
        if info.deepstack:
            inputs["deepstack"] = ((info.deepstack, None, hidden), numbers)
        if info.mask != "causal":
            inputs["groups"] = ((None,), whole)
    runners = [CallRunner(name, inputs, partial(opened, side)) for name, side in (("ours", ours), ("theirs", theirs))]
    results = polygraphy("polygraphy.comparator").Comparator.run(runners, data_loader=feeds)
    return [iterations for _, iterations in results.items()]


def _looser(first: Limits, second: Limits) -> Limits:
    return first if first.cosine <= second.cosine else second
