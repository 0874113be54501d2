"""The fewest tokens whose answers are still the unpruned model's: `--keep auto`."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from svdprune.calib.evaluate.outcome import Outcome, Setting
from svdprune.calib.evaluate.report import summarise
from svdprune.calib.keep_curve import KeepCurve, KeepPoint, KeepSource
from svdprune.calib.progress import Progress
from svdprune.calib.search import keep_grid, smallest_passing
from svdprune.calib.sources import Labelled, Protocol, Source
from svdprune.exporter.calibrate.look import mark_of
from svdprune.exporter.evaluate.judge import Judge, Said
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.seen import Seen, View
from svdprune.exporter.feed import selector_for
from svdprune.exporter.selection import Selector, SelectorConfig
from svdprune.exporter.selection.registry import selector_entry
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.manifest import Positions

AUTO = "auto"
AGREEMENT = 0.98
SOURCE = "scenes:calibration"  # drawn by this project, a series that neither training nor evaluation draws
PICTURES = 64
LEAST = 4  # pictures
LIMIT = 32  # tokens of an answer
PACKAGES = ("svdprune", "torch", "transformers")


@dataclass
class Asked:
    """A picture with its questions and the unpruned model's answers to them."""

    name: str
    image: Image.Image
    seen: Seen
    questions: list[Labelled]
    prompts: list[list[int]]
    said: list[Said]


@dataclass(frozen=True)
class Answered:
    """What is left of an `Asked` without the model: enough to ask a bundle the same."""

    name: str
    image: Image.Image
    questions: list[Labelled]
    said: list[Said]


@dataclass(frozen=True)
class Held:
    """Questions with the unpruned model's answers of at most `limit` tokens, and how right ones are told."""

    pictures: list[Answered]
    protocol: Protocol
    limit: int


class Examination:
    """The same questions for every K; the unpruned model answers once."""

    def __init__(
        self,
        model: Model,
        selector: SelectorConfig,
        start: np.ndarray | None,
        positions: Positions,
        protocol: Protocol,
        limit: int = LIMIT,
    ) -> None:
        self.model, self.positions, self.protocol = model, positions, protocol
        self.pictures: list[Asked] = []
        self.limit = limit
        self._judge = Judge(model, limit)
        self._selector, self._start = selector, start
        self._scorers: dict[int, Selector] = {}
        self._totals: list[int] = []

    def add(self, name: str, image: Image.Image, questions: Sequence[Labelled]) -> None:
        """Ask the unpruned model about a picture.

        Raises:
            NumericalError: NaN or infinity in the features, with the picture's name.
        """
        try:
            seen = self.model.see(image)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        prompts = [self.model.prompt(question.text) for question in questions]
        whole = self.model.whole(seen)
        said = self._judge.listen(whole, prompts)
        self.pictures.append(Asked(name, image, seen, list(questions), prompts, said))
        self._totals.append(whole.span.total)

    def held(self) -> Held:
        """The questions and answers, without the model."""
        pictures = [Answered(one.name, one.image, one.questions, one.said) for one in self.pictures]
        return Held(pictures, self.protocol, self.limit)

    @property
    def questions(self) -> int:
        """How many there are."""
        return sum(len(picture.questions) for picture in self.pictures)

    @property
    def prompt_tokens(self) -> int:
        """Text tokens of a prompt, mean."""
        lengths = [len(prompt) - 1 for picture in self.pictures for prompt in picture.prompts]
        return round(float(np.mean(lengths)))

    def unpruned_accuracy(self) -> float | None:
        """Of the labelled questions, None without any."""
        scores = [
            self.protocol.score(self.model.answer(said.ids), question.answers)
            for picture in self.pictures
            for question, said in zip(picture.questions, picture.said, strict=True)
            if question.answers is not None
        ]
        return float(np.mean(scores)) if scores else None

    def rows(self, keep: int) -> list[int]:
        """Rows that a picture has in the prompt, mean: with K = `keep`, and unpruned."""
        pruned = [len(self._view(picture, keep).rows) for picture in self.pictures]
        return [round(float(np.mean(counts))) for counts in (pruned, self._totals)]

    def at(self, keep: int, progress: Callable[[float], None] = lambda share: None) -> KeepPoint:
        """The answers with K = `keep`, by the selector in torch."""
        return self.point(keep, lambda picture: self._view(picture, keep), progress)

    def _view(self, picture: Asked, keep: int) -> View:
        scores = self._scorer(keep)(*picture.seen.at(None)).cpu().numpy()
        return self.model.view(picture.seen, picture.seen.choose(scores, keep), self.positions)

    def point(
        self, keep: int, see: Callable[[Asked], View], progress: Callable[[float], None] = lambda share: None
    ) -> KeepPoint:
        """The answers about what `see` makes of each picture.

        Raises:
            NumericalError: of `see`, with the picture's name.
        """
        outcomes = []
        for number, picture in enumerate(self.pictures):
            progress(number / len(self.pictures))
            try:
                view = see(picture)
            except NumericalError as error:
                raise NumericalError(f"{picture.name}: {error}") from error
            wanted = [question.answers is not None for question in picture.questions]
            (line,) = self._judge.compare([view], picture.prompts, picture.said, wanted)
            for question, said, verdict in zip(picture.questions, picture.said, line, strict=True):
                score = None
                if question.answers is not None and verdict.ids is not None:
                    score = self.protocol.score(self.model.answer(verdict.ids), question.answers)
                matched = verdict.matched / len(said.ids)
                outcomes.append(Outcome(number, question.kind, score, None, float(verdict.same), matched, verdict.kl))
        return point_of(keep, self.positions, outcomes)

    def _scorer(self, keep: int) -> Selector:
        """Built once where its scores are the same for every K."""
        key = 0 if selector_entry(self._selector.name).any_keep else keep
        if key not in self._scorers:
            self._scorers[key] = selector_for(self.model.spec, self._selector, keep, start=self._start)
        return self._scorers[key]


def point_of(keep: int, positions: Positions, outcomes: Sequence[Outcome]) -> KeepPoint:
    """A point of the curve from the outcomes of all questions."""
    (row,) = summarise({Setting("", keep, positions): [list(outcomes)]}, {})
    assert row.agreement is not None and row.kl is not None and row.matched is not None
    return KeepPoint(
        keep,
        row.agreement.value,
        row.agreement.low,
        row.agreement.high,
        row.matched,
        row.kl.value,
        row.accuracy.value if row.accuracy else None,
    )


def check_agreement(agreement: float) -> None:
    """Refuse a share that is none."""
    if not 0.0 < agreement <= 1.0:
        raise UserError(f"the wished agreement is a share above 0 and up to 1 (0.98 is 98 %), not {agreement!r}")


def find_keep(
    examination: Examination,
    source: Source,
    agreement: float,
    excluded: Collection[str] = (),
    pictures: int = PICTURES,
    progress: Progress = lambda step, share: None,
    say: Callable[[str], None] = lambda line: None,
) -> KeepCurve:
    """Search the smallest K whose answers agree; `say` is told each point of the curve as it is measured.

    Args:
        source: opened for as many pictures as are excluded more than `pictures`.
        excluded: marks of pictures that made the start, which are not asked about.

    Raises:
        UserError: too few pictures, or no K below T that agrees.
    """
    check_agreement(agreement)
    _ask(examination, source, frozenset(excluded), pictures, progress)
    model, questions = examination.model, examination.questions
    enough = math.ceil(1.0 / (1.0 - agreement)) if agreement < 1.0 else questions
    if questions < enough:
        say(f"note: {questions} questions cannot tell an agreement of {agreement:g} from 1: give {enough} or more")
    accuracy = examination.unpruned_accuracy()
    grid = keep_grid(model.spec.tokens)
    say(
        f"searching K in {', '.join(map(str, grid))} for an agreement of {agreement:g}: "
        f"{questions} questions about {len(examination.pictures)} pictures"
    )
    points: dict[int, KeepPoint] = {}

    def measure(keep: int) -> float:
        share = len(points) / (2 + len(grid).bit_length())
        points[keep] = examination.at(keep, lambda part: progress(f"answers with K = {keep}", min(share, 1.0)))
        say(told(points[keep]))
        return points[keep].agreement

    found = smallest_passing(grid, measure, agreement)
    if found.irregular:
        say(
            f"note: the curve is not monotonic: K = {', '.join(map(str, found.irregular))} agrees too, "
            "but a larger K does not"
        )
    if found.answer is None:
        best = max(points.values(), key=lambda point: (point.agreement, point.keep))
        broken = f"; {source.describe_broken()}" if source.broken else ""
        raise UserError(
            f"no K below {model.spec.tokens} reaches an agreement of {agreement:g} (the best measured is "
            f"{best.agreement:.3f} at K = {best.keep}{broken}): lower --agreement, try another --select, or keep all "
            "of them with --select none"
        )
    return KeepCurve(
        wished=agreement,
        keep=found.answer,
        tokens=model.spec.tokens,
        grid=grid,
        points=[points[keep] for keep in found.values],
        irregular=found.irregular,
        unpruned_accuracy=accuracy,
        positions=examination.positions,
        prompt_tokens=examination.prompt_tokens,
        rows=examination.rows(found.answer),
        source=KeepSource(
            source.spec,
            source.listing.description,
            source.seed,
            len(examination.pictures),
            questions,
            examination.limit,
            [f"{name}: {reason}" for name, reason in source.broken],
        ),
        written_by={package: importlib.metadata.version(package) for package in PACKAGES},
    )


def told(point: KeepPoint) -> str:
    """A point of the curve as a line for a person."""
    accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.3f}"
    return (
        f"K = {point.keep:<4} agreement {point.agreement:.3f} ({point.low:.2f}-{point.high:.2f}), "
        f"tokens {point.matched:.3f}, KL {point.kl:.3f}{accuracy}"
    )


def _ask(examination: Examination, source: Source, excluded: frozenset[str], pictures: int, progress: Progress) -> None:
    for sample in source.samples():
        if len(examination.pictures) == pictures:
            break
        if mark_of(sample.image) in excluded:
            continue
        progress(f"unpruned answers, picture {len(examination.pictures) + 1}", 0.0)
        examination.add(sample.name, sample.image, sample.questions)
    if len(examination.pictures) < LEAST:
        left = f", beside those that made the calibration's start, and {LEAST} are needed" if excluded else ""
        wanted = left or f" and {LEAST} are needed"
        broken = f": {source.describe_broken()}" if source.broken else ""
        raise UserError(
            f"{source.spec} has {len(examination.pictures)} usable pictures{wanted}{broken}; give more with --images"
        )
