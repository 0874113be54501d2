"""A calibration from beginning to end."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from svdprune.calib.calibration import (
    PROJECTED,
    Arrays,
    Calibration,
    Candidate,
    Energy,
    Features,
    Pictures,
    Settings,
    Trial,
    Wished,
)
from svdprune.calib.progress import Progress
from svdprune.calib.sources import Source
from svdprune.calib.spectrum import LEVELS
from svdprune.exporter.calibrate.answers import Scoring, better, compare
from svdprune.exporter.calibrate.fidelity import Exact, block_widths, fewest
from svdprune.exporter.calibrate.look import Gathered, gather, other_taps
from svdprune.exporter.evaluate.model import Eyes, Model
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import ModelInfo

VARIANCE = 0.9  # where neither a rank nor a share is asked for
OVERLAP = 0.99
COLUMNS = 128  # of the stored start, at least: an export may want a wider block than the one found
PACKAGES = ("svdprune", "numpy", "torch", "transformers")

CRITERION = (
    "share of greedy answers that are the unpruned model's, token for token, at K = {keep} with exact leverage scores, "
    "on pictures that did not make the basis; another choice than the checkpoint's own tap, raw, is better only where "
    "the 95 % interval of the difference on the same questions, drawn over pictures, is above 0"
)
UNASKED = "not compared, as the language model was not asked: the checkpoint's own tap, raw unless told otherwise"


@dataclass(frozen=True)
class Request:
    """What to find out.

    Attributes:
        keeps: K at which kept sets are compared; answers at the first.
        rank: of the leverage score; None for as many directions as hold `variance` of the variance on average.
        centre: whether to subtract the mean token; None to find out.
        overlap: wished, of the kept sets with those of a float64 SVD.
        at_least: pictures. limit: the most tokens of an answer.
    """

    keeps: tuple[int, ...]
    rank: int | None = None
    variance: float | None = None
    centre: bool | None = None
    overlap: float = OVERLAP
    at_least: int = 16
    limit: int = 32

    def check(self, eyes: Eyes) -> None:
        """Refuse, in a sentence, what cannot be for this checkpoint."""
        spec = eyes.spec
        if self.rank is not None and self.variance is not None:
            raise UserError("give a rank or a share of the variance, not both")
        if self.variance is not None and not 0.0 < self.variance <= 1.0:
            raise UserError(f"variance is a share above 0 and up to 1 (0.9 is 90 %), not {self.variance!r}")
        if not 0.0 < self.overlap <= 1.0:
            raise UserError(f"the wished overlap is a share above 0 and up to 1, not {self.overlap!r}")
        if not self.keeps:
            raise UserError("at how many kept tokens shall the sets be compared? Give a count, --keep 32")
        for keep in self.keeps:
            if not 1 <= keep < spec.tokens:
                raise UserError(
                    f"at {keep} of {spec.tokens} kept tokens every setting keeps the same: give 1 to {spec.tokens - 1}"
                )
            SelectorConfig(rank=self.rank or 1).check(tokens=spec.tokens, channels=spec.channels, keep=keep)


def calibrate(
    eyes: Eyes,
    name: str,
    revision: str | None,
    source: Source,
    request: Request,
    progress: Progress = lambda step, share: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Calibration, dict[str, np.ndarray]]:
    """The record, without its arrays' file, and the arrays (`svdprune.calib.calibration`).

    Args:
        eyes: the checkpoint; a whole `Model` is asked questions, the vision part alone is not.
        name, revision: of the model, for the record.
        say: told of each trial, a line each.

    Raises:
        UserError: a request that the checkpoint cannot fulfil, too few pictures.
        NumericalError: NaN or infinity in the features, with the picture's name.
    """
    request.check(eyes)
    gathered = gather(eyes, source, request.at_least, lambda step, share: progress(step, share and 0.5 * share))
    scorings = _scorings(eyes, gathered, request)
    candidates: list[Candidate] = []
    if isinstance(eyes, Model):
        candidates = compare(
            eyes, gathered.choice, scorings, request.keeps[0], request.limit,
            lambda step, share: progress(step, share and 0.5 + 0.3 * share),
        )  # fmt: skip
    chosen = scorings[_centred(request, candidates)]
    best = better(candidates[: len(scorings)]) if candidates else None
    arrays = _arrays(eyes, gathered, chosen.rank)
    start = arrays["start_centred" if chosen.centre else "start"]
    progress("looking for the fewest iterations and the narrowest block", 0.8)
    features = [matrix for picture in gathered.choice for matrix in picture.seen.matrices()]
    exact = Exact.of(features, chosen.config, request.keeps, eyes.spec)
    trials, met = fewest(exact, chosen.rank, chosen.centre, start, request.overlap, lambda trial: say(told(trial)))
    found = trials[-1] if met else max(trials, key=lambda trial: trial.overlap)
    progress("judging the settings on other pictures", 0.95)
    settings = Settings(chosen.rank, found.block, found.iterations, chosen.centre)
    record = Calibration(
        model=ModelInfo(name, eyes.family.name, revision, eyes.checkpoint.fingerprint()),
        features=Features(eyes.spec.tokens, eyes.spec.channels, list(eyes.spec.grid), eyes.spec.tap, eyes.spec.budget),
        pictures=_pictures(source, gathered),
        wished=Wished(request.overlap, list(request.keeps), request.rank, _variance(request), request.centre),
        energy=_energy(gathered, _variance(request) or VARIANCE),
        criterion=CRITERION.format(keep=request.keeps[0]) if candidates else UNASKED,
        candidates=candidates,
        best_tap=best.tap if best and best.tap else str(eyes.spec.tap),
        trials=trials,
        met=met,
        judged=_judged(eyes, gathered, settings, start, request),
        settings=settings,
        arrays=Arrays("", ""),
        written_by={package: importlib.metadata.version(package) for package in PACKAGES},
    )
    progress("done", 1.0)
    return record, arrays


def told(trial: Trial) -> str:
    """A trial as a line for a person."""
    return (
        f"iterations {trial.iterations}, block {trial.block}, {trial.start} start: "
        f"overlap {trial.overlap:.4f}, worst picture {trial.worst:.3f}"
    )


def remarks(found: Calibration) -> list[str]:
    """What the record does not say well of itself, a sentence each."""
    said = []
    if not found.met:
        best = max(trial.overlap for trial in found.trials)
        said.append(f"no setting reached an overlap of {found.wished.overlap}: the best, {best:.4f}, was taken")
    elif found.judged[0].overlap < found.wished.overlap:
        said.append(
            f"on the pictures that judge, the overlap is {found.judged[0].overlap:.4f}, below the wished "
            f"{found.wished.overlap}: wish for more, or give more pictures"
        )
    own = str(found.features.tap)
    if found.best_tap != own:
        said.append(
            f"scores of the tap {found.best_tap} serve better than those of {own}, which the graph scores: "
            f"`svdprune evaluate --selectors leverage:tap={found.best_tap}` measures how much"
        )
    for one in found.candidates:
        if one.tap is None and one.difference and one.difference[2] >= 0.0:
            value, low, high = one.difference
            sure = low > 0.0
            said.append(
                f"`{one.label}` {'keeps the answers better than' if sure else 'is not told apart from'} leverage here "
                f"({value:+.3f}, {low:+.2f} to {high:+.2f}): "
                + (f"--select {one.label}" if sure else "more pictures, or another K, would tell")
            )
    return said


def _variance(request: Request) -> float | None:
    return request.variance or (VARIANCE if request.rank is None else None)


def _scorings(eyes: Eyes, gathered: Gathered, request: Request) -> list[Scoring]:
    """Raw and centred at each tap, the checkpoint's own first."""
    own = str(eyes.spec.tap)
    taps: dict[str, int | str | None] = {own: None}
    taps.update((str(tap), tap) for tap in other_taps(eyes))
    taps[PROJECTED] = PROJECTED
    variance = _variance(request)
    return [
        Scoring(
            tap,
            place,
            centre,
            (request.rank or 1) if variance is None else gathered.spectra[tap, centre].rank(variance),
        )
        for tap, place in taps.items()
        for centre in (False, True)
    ]


def _centred(request: Request, candidates: list[Candidate]) -> int:
    """0 for raw, 1 for centred: places in the list of scorings and of candidates."""
    if request.centre is not None:
        return int(request.centre)
    return int(better(candidates[:2]) is candidates[1]) if candidates else 0


def _arrays(eyes: Eyes, gathered: Gathered, rank: int) -> dict[str, np.ndarray]:
    spec = eyes.spec
    limit = min(spec.tokens, spec.channels)
    columns = min(spec.channels, max(COLUMNS, block_widths(rank, limit)[-1]))
    arrays = {
        name: gathered.pool.start(columns, centre).astype(np.float32)
        for name, centre in (("start", False), ("start_centred", True))
    }
    for (tap, centre), spectrum in gathered.spectra.items():
        arrays[f"energy/{tap}/{'centred' if centre else 'raw'}"] = spectrum.curve
    return arrays


def _energy(gathered: Gathered, variance: float) -> list[Energy]:
    rows = []
    for (tap, centre), spectrum in gathered.spectra.items():
        ranks = {f"{level:g}": spectrum.rank(level) for level in sorted({*LEVELS, variance})}
        single = spectrum.ranks(variance)
        rows.append(Energy(tap, centre, ranks, variance, min(single), max(single)))
    return rows


def _judged(eyes: Eyes, gathered: Gathered, settings: Settings, start: np.ndarray, request: Request) -> list[Trial]:
    """The chosen settings, then the defaults for the rank with the calibrated and with the seeded start."""
    default = SelectorConfig(rank=settings.rank, centre=settings.centre)
    chosen = SelectorConfig(
        rank=settings.rank, centre=settings.centre, block=settings.block, iterations=settings.iterations
    )
    exact = Exact.of(gathered.judgement, default, request.keeps, eyes.spec)
    return [exact.trial(chosen, start), exact.trial(default, start), exact.trial(default, None)]


def _pictures(source: Source, gathered: Gathered) -> Pictures:
    return Pictures(
        source=source.spec,
        description=source.listing.description,
        seed=source.seed,
        limit=source.limit,
        start=len(gathered.digests),
        choice=len(gathered.choice),
        judgement=gathered.judges,
        questions=sum(len(picture.questions) for picture in gathered.choice),
        duplicates=gathered.duplicates,
        broken=[f"{name}: {reason}" for name, reason in source.broken],
        start_digests=gathered.digests,
    )
