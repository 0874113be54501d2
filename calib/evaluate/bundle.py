"""A bundle as it is, by the runtime alone: its answers against labels, and against the same bundle without pruning."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from svdprune.calib.evaluate.outcome import Outcome, Setting
from svdprune.calib.evaluate.report import UNPRUNED, Report, summarise
from svdprune.calib.progress import Progress
from svdprune.calib.sources import Source
from svdprune.calib.statistics import kl_divergence
from svdprune.runtime.answer import Sight
from svdprune.runtime.errors import MissingDependency, NumericalError, UserError
from svdprune.runtime.manifest import Positions
from svdprune.runtime.ort import CPU, open_session
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.tiling.feed import prepare
from svdprune.runtime.tiling.pictured import sight_of
from svdprune.runtime.tiling.slots import chosen
from svdprune.runtime.unpruned import unpruned_graph
from svdprune.runtime.vlm import Vlm


@dataclass(frozen=True)
class Answered:
    """Greedy ids, the end token included; their text; log-probabilities float64 (V,) of the first token."""

    ids: list[int]
    text: str
    first: np.ndarray


class Unpruned:
    """The bundle's own vision graph without its selection, on ONNX Runtime.

    Raises:
        MissingDependency: onnx is not installed, which takes the selection out of the graph.
    """

    def __init__(self, vlm: Vlm, folder: Path, threads: int | None = None) -> None:
        self._vlm = vlm
        self._session = open_session(
            unpruned_graph(vlm.bundle.file(vlm.manifest.vision.file), folder / "unpruned.onnx"), threads, CPU
        )

    def see(self, image: Image.Image, sight: Sight) -> Sight:
        """All features of the picture `image`, which is the one that `sight` shows."""
        info = self._vlm.manifest.vision
        if info.tiles is not None:
            return self._tiles(image)
        feed = sight.pixels if info.input == "uint8" else normalise(sight.pixels, self._vlm.settings)
        (features,) = self._session.run(["features"], {"pixels": feed[None]})
        if not np.isfinite(features).all():
            raise NumericalError("the unpruned features hold NaN or infinity: export with --precision fp32")
        kept = np.arange(info.tokens, dtype=np.int64)
        return Sight(features[0], kept, np.zeros(info.tokens, np.float32), sight.pixels)

    def _tiles(self, image: Image.Image) -> Sight:
        vlm = self._vlm
        fed = prepare(image, vlm.settings, vlm.manifest)
        assert fed.cut is not None and fed.slots is not None  # of a bundle with tiles
        names = [value.name for value in self._session.get_inputs()]
        made = ["features", "deepstack"] if vlm.manifest.vision.deepstack else ["features"]
        features, *levels = self._session.run(made, {name: fed.inputs[name] for name in names})
        if not all(np.isfinite(values).all() for values in (features, *levels)):
            raise NumericalError("the unpruned features hold NaN or infinity: export with --precision fp32")
        groups, slots = fed.slots.candidates.shape
        everything = np.tile(np.arange(slots), (groups, 1))
        scores = np.zeros((groups, slots), np.float32)
        found = chosen(fed.slots, features, everything, scores, len(fed.cut.places), *levels)
        return sight_of(fed.cut, found, vlm.embed, vlm.marks)


def answer(
    vlm: Vlm,
    sight: Sight,
    question: str,
    limit: int,
    until: Sequence[int] | None = None,
    positions: Positions | None = None,
) -> Answered:
    """The greedy answer of at most `limit` tokens; with `until`, only up to the first that differs from those.

    Args:
        positions: in place of the bundle's.
    """
    prompt = vlm.cached_prompt(sight, positions)
    logits = prompt.advance(vlm.prompt_ids(question))
    wide = logits.astype(np.float64)
    first = wide - wide.max()
    first -= np.log(np.exp(first).sum())
    ids: list[int] = []
    while True:
        ids.append(int(logits.argmax()))
        differs = until is not None and ids != list(until[: len(ids)])
        if differs or ids[-1] in vlm.manifest.decoder.eos or len(ids) >= limit or not prompt.room():
            return Answered(ids, vlm.text.decode(ids).strip(), first)
        logits = prompt.push(ids[-1])


def evaluate_bundle(
    vlm: Vlm,
    source: Source,
    *,
    limit: int = 32,
    threads: int | None = None,
    progress: Progress = lambda step, share: None,
) -> Report:
    """The bundle's answers, and the unpruned ones by the same decoder and weights.

    Where onnx is missing, the unpruned model cannot be run: on labelled data the report then holds the bundle's
    accuracy alone and says so.

    Raises:
        UserError: too few usable pictures, or neither labels nor an unpruned model.
        NumericalError: NaN or infinity in features or logits, with the picture's name.
    """
    info, protocol = vlm.manifest.vision, source.protocol
    own = Setting(info.selector.name, info.keep, vlm.positions)
    # The unpruned model's positions are the original ones; of one axis, both policies say the same of all tokens.
    policy = vlm.positions if vlm.manifest.decoder.position_axes == 1 else "original"
    whole = Setting(UNPRUNED, info.tokens, policy)
    outcomes: dict[Setting, list[list[Outcome]]] = {}
    pictures = questions = 0
    labelled = True
    missing = ""
    with tempfile.TemporaryDirectory() as folder:
        unpruned = None
        try:
            unpruned = Unpruned(vlm, Path(folder), threads)
            outcomes[whole] = [[]]
        except MissingDependency as error:
            missing = str(error)
        outcomes[own] = [[]]
        for pictures, sample in enumerate(source.samples(), 1):
            progress(f"picture {pictures} of {source.count}", (pictures - 1) / source.count)
            try:
                sight = vlm.see(sample.image)
                everything = None if unpruned is None else unpruned.see(sample.image, sight)
                for question in sample.questions:
                    questions += 1
                    labelled = labelled and question.answers is not None
                    mine = answer(vlm, sight, question.text, limit)
                    theirs = None
                    if everything is not None:
                        theirs = answer(vlm, everything, question.text, limit, positions=policy)
                    known = question.answers
                    positive = "yes" in known if protocol.binary and known is not None else None
                    for key, one in ((whole, theirs), (own, mine)):
                        if one is not None:
                            score = None if known is None else protocol.score(one.text, known)
                            same, matched, kl = (None, None, None) if theirs is None else _against(one, theirs)
                            found = Outcome(pictures - 1, question.kind, score, positive, same, matched, kl)
                            outcomes[key][0].append(found)
            except NumericalError as error:
                raise NumericalError(f"{sample.name}: {error}") from error
            if missing and not labelled:
                raise UserError(f"{missing}; the data has no labels either, so there is nothing to measure by")
    facts = {
        "model": f"{vlm.manifest.model.id}, bundle of {info.keep} of {info.tokens} tokens",
        "data": source.description,
        "questions": f"{questions} about {pictures} pictures, sample seed {source.seed}",
        "answers": f"greedy, at most {limit} tokens; vision {info.precision} by {vlm.vision.name}, decoder "
        f"{vlm.manifest.decoder.precision} by {vlm.decoder.name}",
        "unpruned": f"not measured: {missing}" if missing else "the bundle's graph without its selection, ONNX Runtime",
        "versions": f"svdprune {importlib.metadata.version('svdprune')}",
    }
    rows = summarise(outcomes, {}, protocol.binary)
    return Report(facts, info.tokens, pictures, rows, list(source.broken))


def _against(mine: Answered, theirs: Answered) -> tuple[float, float, float]:
    """Same answer or not, share of the other's tokens before the first that differs, divergence of the first token."""
    matched = _common(mine.ids, theirs.ids)
    same = matched == len(theirs.ids) == len(mine.ids)
    return float(same), matched / len(theirs.ids), float(kl_divergence(theirs.first, mine.first))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
