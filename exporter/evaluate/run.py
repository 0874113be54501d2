"""Contenders against each other on one sample: every picture is encoded once, every choice shares it."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from svdprune.calib.evaluate.outcome import Outcome, Setting
from svdprune.calib.evaluate.report import UNPRUNED, Report, summarise
from svdprune.calib.progress import Progress
from svdprune.calib.sources import Labelled, Protocol, Sample, Source
from svdprune.exporter.evaluate.contenders import PROJECTED, Contender
from svdprune.exporter.evaluate.judge import Judge
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.seen import Seen
from svdprune.exporter.families import VisionSpec
from svdprune.exporter.feed import selector_for
from svdprune.exporter.selection import Selector
from svdprune.runtime.errors import NumericalError
from svdprune.runtime.manifest import Positions

PACKAGES = ("svdprune", "torch", "transformers")


@dataclass
class Collected:
    """Outcomes of each setting, one list a seed, and the seconds that each choice took."""

    outcomes: dict[Setting, list[list[Outcome]]] = field(default_factory=dict)
    seconds: dict[Setting, list[float]] = field(default_factory=dict)

    def put(self, setting: Setting, seed: int, outcome: Outcome) -> None:
        """Add an outcome of the setting's run number `seed`."""
        runs = self.outcomes.setdefault(setting, [])
        while len(runs) <= seed:
            runs.append([])
        runs[seed].append(outcome)


def evaluate_model(
    model: Model,
    name: str,
    source: Source,
    contenders: Sequence[Contender],
    keeps: Sequence[int],
    policies: Sequence[Positions],
    *,
    limit: int = 32,
    batch: int = 64,
    progress: Progress = lambda step, share: None,
) -> Report:
    """Every contender at every K under every policy, on the same pictures and questions.

    Args:
        name: of the model, for the record. limit: the most tokens of an answer. batch: rows of the language model at
            once.

    Raises:
        UserError: too few usable pictures, a contender that does not fit the model.
        NumericalError: NaN or infinity in features or scores, with the picture's name.
    """
    for contender in contenders:
        if isinstance(contender.tap, int):
            model.add_tap(contender.tap)
    chooser = Chooser(model, contenders, keeps)
    judge = Judge(model, limit, batch)
    collected = Collected()
    pictures = 0
    for pictures, sample in enumerate(source.samples(), 1):
        progress(f"picture {pictures} of {source.count}", (pictures - 1) / source.count)
        try:
            _ask_all(model, judge, chooser, sample, pictures - 1, policies, source.protocol, collected)
        except NumericalError as error:
            raise NumericalError(f"{sample.name}: {error}") from error
    progress("working out the intervals", 1.0)
    rows = summarise(collected.outcomes, collected.seconds, source.protocol.binary)
    questions = len(next(iter(collected.outcomes.values()))[0])
    facts = {
        "model": name,
        "data": source.description,
        **_tiles(model.spec),
        "questions": f"{questions} about {pictures} pictures, sample seed {source.seed}",
        "answers": f"greedy, at most {limit} tokens, {str(model.dtype).removeprefix('torch.')} on {model.device.type}",
        "select": f"median time of the scores and the choice for one picture, float32 in torch on {model.device.type}",
        "versions": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
    }
    return Report(facts, model.spec.tokens, pictures, rows, list(source.broken))


class Chooser:
    """The kept tokens of a picture for every contender, K and seed, with the time that each choice took."""

    def __init__(self, model: Model, contenders: Sequence[Contender], keeps: Sequence[int]) -> None:
        self._model, self.contenders, self.keeps = model, list(contenders), list(keeps)
        self.projected = any(contender.tap == PROJECTED for contender in contenders)
        self._scorers: dict[tuple[int, int, int], Selector] = {}
        spec = model.spec
        for number, contender in enumerate(contenders):
            channels = spec.hidden if contender.tap == PROJECTED else spec.channels
            for seed, config in enumerate(contender.configs):
                shared = None
                for keep in self.keeps:
                    config.check(tokens=spec.tokens, channels=channels, keep=keep)
                    if shared is None or not contender.any_keep:
                        shared = selector_for(spec, config, keep, channels)
                    self._scorers[number, seed, keep] = shared

    def choose(self, seen: Seen) -> dict[tuple[int, int, int], tuple[np.ndarray, float]]:
        """(contender, seed, K) -> kept candidates int64, ascending, and seconds."""
        done: dict[int, tuple[np.ndarray, float]] = {}
        found = {}
        for key, scorer in self._scorers.items():
            tokens, attention = seen.at(self.contenders[key[0]].tap)
            if id(scorer) not in done:
                began = time.perf_counter()
                scores = scorer(tokens, attention).cpu().numpy()  # waits for a GPU to be done
                done[id(scorer)] = scores, time.perf_counter() - began
            scores, seconds = done[id(scorer)]
            began = time.perf_counter()
            kept = seen.choose(scores, key[2])
            found[key] = kept, seconds + time.perf_counter() - began
        return found


def _ask_all(
    model: Model,
    judge: Judge,
    chooser: Chooser,
    sample: Sample,
    picture: int,
    policies: Sequence[Positions],
    protocol: Protocol,
    collected: Collected,
) -> None:
    """All of one picture: unpruned first, then every choice of each K together."""
    seen = model.see(sample.image, chooser.projected)
    asked = sample.questions
    prompts = [model.prompt(question.text) for question in asked]
    references = judge.listen(model.whole(seen), prompts)
    unpruned = Setting(UNPRUNED, model.spec.tokens, model.unpruned_positions)
    for question, said in zip(asked, references, strict=True):
        score = _score(protocol, question, model, said.ids)
        collected.put(unpruned, 0, _outcome(protocol, question, picture, score, 1.0, 1.0, 0.0))
    wanted = [question.answers is not None for question in asked]
    choices = chooser.choose(seen)
    for keep in chooser.keeps:
        keys, views = [], []
        for (number, seed, count), (kept, seconds) in choices.items():
            if count != keep:
                continue
            view = model.view(seen, kept, policies[0])
            for policy in policies:
                setting = Setting(chooser.contenders[number].label, keep, policy)
                collected.seconds.setdefault(setting, []).append(seconds)
                keys.append((setting, seed))
                views.append(replace(view, positions=policy))
        for (setting, seed), verdicts in zip(keys, judge.compare(views, prompts, references, wanted), strict=True):
            for question, said, verdict in zip(asked, references, verdicts, strict=True):
                score = None if verdict.ids is None else _score(protocol, question, model, verdict.ids)
                share = verdict.matched / len(said.ids)
                outcome = _outcome(protocol, question, picture, score, float(verdict.same), share, verdict.kl)
                collected.put(setting, seed, outcome)


def _tiles(spec: VisionSpec) -> dict[str, str]:
    """What K and the number of tokens mean where pictures are cut into tiles."""
    if spec.tiling is None:
        return {}
    of = "the whole picture" if spec.budget == "picture" else "each tile"
    return {"K": f"of {of}, which has up to {spec.tokens} tokens"}


def _score(protocol: Protocol, question: Labelled, model: Model, ids: Sequence[int]) -> float | None:
    return None if question.answers is None else protocol.score(model.answer(ids), question.answers)


def _outcome(
    protocol: Protocol, question: Labelled, picture: int, score: float | None, same: float, matched: float, kl: float
) -> Outcome:
    positive = "yes" in question.answers if protocol.binary and question.answers is not None else None
    return Outcome(picture, question.kind, score, positive, same, matched, kl)
