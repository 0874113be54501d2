"""What a source of pictures gives, the schemes by name, and the sampling that all of them share."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from svdprune.calib.progress import Progress
from svdprune.calib.sources.protocols import Protocol
from svdprune.runtime.errors import UserError
from svdprune.runtime.preprocess import open_image

DEFAULT_QUESTIONS = (
    "What is shown in this picture?",
    "What color is the largest object?",
    "How many objects are there?",
)
"""Asked about pictures that come without questions: answers are compared with the unpruned model's, not with labels."""

NAMED = 5  # broken pictures named in one sentence


@dataclass(frozen=True)
class Labelled:
    """A question as it is put to the model. `answers` None: no label; `kind`: the group it is counted in."""

    text: str
    answers: list[str] | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Sample:
    """One usable picture, decoded, upright, RGB."""

    name: str
    image: Image.Image
    questions: list[Labelled]


@dataclass(frozen=True)
class Entry:
    """A picture that has not been opened. `load` raises `UserError` when it cannot be used."""

    name: str
    load: Callable[[], tuple[Image.Image, list[Labelled]]]


@dataclass(frozen=True)
class Listing:
    """All a source holds: entries in a fixed order, how answers are judged, and what to record about it."""

    entries: Sequence[Entry]
    protocol: Protocol
    description: str


Lister = Callable[[str, int, int], Listing]
"""(what follows the scheme, pictures wanted, seed) -> what there is; the count is for sources without an end."""

_SCHEMES: dict[str, Lister] = {}


def register(name: str) -> Callable[[Lister], Lister]:
    """Decorator: a spec `name:rest` is read by this function from here on."""

    def add(lister: Lister) -> Lister:
        _SCHEMES[name] = lister
        return lister

    return add


def schemes() -> list[str]:
    """The schemes' names."""
    return sorted(_SCHEMES)


@dataclass
class Source:
    """A seeded sample of a listing.

    Attributes:
        spec: as the user typed it.
        listing: everything there is.
        limit: the most pictures that `samples` gives.
        seed: of the order in which pictures are tried; a broken one is replaced by the next.
        at_least: usable pictures wanted, fewer are an error.
        labels: False leaves the answers out, as if the data had none.
        broken: (name, reason) of each picture that could not be used, filled while `samples` runs.
        skipped: pictures that were not tried because the limit was reached, known when `samples` has ended.
    """

    spec: str
    listing: Listing
    limit: int
    seed: int
    at_least: int = 1
    questions: Sequence[str] = DEFAULT_QUESTIONS
    progress: Progress = lambda step, share: None
    labels: bool = True
    broken: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0

    @property
    def protocol(self) -> Protocol:
        """How answers are judged."""
        return self.listing.protocol

    @property
    def description(self) -> str:
        """What is sampled and how it is judged, for the record."""
        return self.listing.description if self.labels else f"{self.listing.description}; labels left aside"

    @property
    def count(self) -> int:
        """Pictures that `samples` will give when none is broken."""
        return min(self.limit, len(self.listing.entries))

    def samples(self) -> Iterator[Sample]:
        """The sample, one picture in memory at a time; each call gives the same again.

        Raises:
            UserError: after the last picture, when fewer than `at_least` could be used: how many, and what is wrong
                with the others.
        """
        self.broken.clear()
        entries = self.listing.entries
        order = list(range(len(entries)))
        random.Random(self.seed).shuffle(order)
        used = 0
        for place in order:
            if used == self.limit:
                break
            entry = entries[place]
            try:
                image, questions = entry.load()
            except UserError as error:
                self.broken.append((entry.name, str(error)))
                continue
            used += 1
            self.progress(f"picture {used} of {self.count}", used / self.count)
            asked = questions or [Labelled(text) for text in self.questions]
            if not self.labels:
                asked = [replace(question, answers=None) for question in asked]
            yield Sample(entry.name, image, asked)
        self.skipped = len(entries) - used - len(self.broken)
        if used < self.at_least:
            raise UserError(
                f"{self.spec} has {used} usable pictures of {len(entries)} and {self.at_least} are needed"
                + (f": {self.describe_broken()}" if self.broken else ": give more pictures")
            )

    def describe_broken(self) -> str:
        """How many pictures could not be used, and the first of them by name and reason; "" when none."""
        if not self.broken:
            return ""
        named = "; ".join(f"{name} ({reason})" for name, reason in self.broken[:NAMED])
        more = f"; and {len(self.broken) - NAMED} more" if len(self.broken) > NAMED else ""
        return f"{len(self.broken)} could not be used: {named}{more}"


def open_source(
    spec: str,
    *,
    limit: int,
    seed: int,
    at_least: int = 1,
    questions: Sequence[str] = DEFAULT_QUESTIONS,
    progress: Progress = lambda step, share: None,
    labels: bool = True,
) -> Source:
    """A sample of the pictures that `spec` names.

    Args:
        spec: a folder of pictures, `scenes`, `easy-vqa`, `hf:ID-OR-FOLDER[:SPLIT]`, `gqa:FOLDER`, `textvqa:FOLDER`,
            `textvqa+ocr:FOLDER`, `pope:FOLDER` or `vqav2:FOLDER`.
        limit: the most pictures. seed: of the choice among them. at_least: fewer usable ones are an error.
        questions: asked about pictures that come without any. labels: False leaves the answers out.

    Raises:
        UserError: an unknown scheme, nothing at the place it names, or files that are not in the format it stands for.
    """
    if limit < 1:
        raise UserError(f"{limit} pictures are too few: ask for 1 or more")
    scheme, found, rest = spec.partition(":")
    if scheme in _SCHEMES and (found or not Path(spec).exists()):
        listing = _SCHEMES[scheme](rest, limit, seed)
    elif found and re.fullmatch(r"[a-z][\w+-]+", scheme) and not Path(spec).exists():
        raise UserError(_unknown(f"the scheme {scheme!r} is not known", scheme))
    elif Path(spec).expanduser().exists() or "/" in spec or spec.startswith((".", "~")):
        listing = _SCHEMES["folder"](spec, limit, seed)
    else:
        raise UserError(_unknown(f"there is no folder {spec!r} and no source of that name", spec))
    if not listing.entries:
        raise UserError(f"{spec} holds no pictures: {listing.description}")
    if len(listing.entries) < at_least:
        raise UserError(f"{spec} has {len(listing.entries)} pictures and {at_least} are needed: give more pictures")
    return Source(spec, listing, limit, seed, at_least, questions, progress, labels)


def pictures(
    spec: str,
    *,
    at_least: int,
    limit: int,
    seed: int,
    progress: Progress = lambda step, share: None,
) -> list[Image.Image]:
    """Pictures alone, RGB, in the order of the sample.

    Raises:
        UserError: as `open_source`, or fewer than `at_least` can be used; the broken ones are counted and named.
    """
    source = open_source(spec, limit=limit, seed=seed, at_least=at_least, progress=progress)
    return [sample.image for sample in source.samples()]


def file_entry(path: Path, questions: Sequence[Labelled], name: str | None = None) -> Entry:
    """An entry whose picture is a file."""
    held = list(questions)
    return Entry(name or path.name, lambda: (open_image(path), list(held)))


def grouped(rows: Sequence[tuple[Path, str, Labelled]]) -> list[Entry]:
    """Entries of (file, name, question) rows, one for each picture, in the order in which pictures first appear."""
    places: dict[str, tuple[Path, list[Labelled]]] = {}
    for path, name, question in rows:
        places.setdefault(name, (path, []))[1].append(question)
    return [file_entry(path, questions, name) for name, (path, questions) in places.items()]


def _unknown(problem: str, name: str) -> str:
    near = difflib.get_close_matches(name, _SCHEMES, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{problem}{hint}: give a folder of pictures, or one of {', '.join(schemes())}"
