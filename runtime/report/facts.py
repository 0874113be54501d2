"""``report/facts.json``: what only the export could find out for the page, so that the page can be written again.

Everything else on the page is read from the bundle itself. A bundle without the file has a page all the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.profile.report import ProfileReport
from svdprune.runtime.report import FACTS

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Energy:
    """Mean share of the variance in the first 1, 2, ... directions of the tokens that are scored.

    ``centre``: with the mean token subtracted. ``pictures`` of ``source`` were looked at.
    """

    centre: bool
    curve: list[float]
    pictures: int
    source: str


@dataclass(frozen=True)
class EstimatedStage:
    """Work of a stage; ``seconds`` and the limit that ``bound`` it are null for a target without peaks."""

    name: str
    flops: float
    bytes: float
    seconds: float | None = None
    bound: str | None = None


@dataclass(frozen=True)
class EstimatedCase:
    """A number of vision tokens: seconds (null without peaks) and bytes of memory, by part, and all of it."""

    tokens: int
    stages: list[EstimatedStage]
    first_token: float | None
    answer: float | None
    memory: dict[str, int]
    total: int
    fits: bool | None = None


@dataclass(frozen=True)
class Estimated:
    """The roofline model for the bundle's target, or the work alone where the target has no peaks.

    ``kind`` says that it is a model. ``free``: bytes of the target's memory less what its system takes.
    """

    kind: str
    target: str
    device: str
    precision: str
    decoder_precision: str
    prompt_tokens: int
    new_tokens: int
    pruned: EstimatedCase
    unpruned: EstimatedCase
    free: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Elsewhere:
    """One line for another target, in ``precision``: first token in seconds, at K and at all tokens; bytes at K."""

    target: str
    device: str
    precision: str
    pruned: float
    unpruned: float
    memory: int
    fits: bool | None


@dataclass(frozen=True)
class ShownPanel:
    """``photo`` and ``scores`` are files of the bundle, ``low`` and ``high`` the lowest and highest score."""

    photo: str
    scores: str
    kept: int
    tokens: int
    low: float
    high: float


@dataclass(frozen=True)
class ShownPicture:
    """A picture that the export looked at. ``question`` and ``answer`` are null where nothing was asked."""

    name: str
    panels: list[ShownPanel]
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Facts:
    """All of ``report/facts.json``. A ``..._note`` says why its part is missing.

    ``measured`` is a short measurement on the machine that exported; ``licence`` of the weights, as the checkpoint has
    it.
    """

    energy: list[Energy] = field(default_factory=list)
    estimate: Estimated | None = None
    estimate_note: str | None = None
    elsewhere: list[Elsewhere] = field(default_factory=list)
    measured: ProfileReport | None = None
    measured_note: str | None = None
    pictures: list[ShownPicture] = field(default_factory=list)
    pictures_note: str | None = None
    licence: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON, schema first."""
        content = dataclasses.asdict(self)
        return json.dumps({"schema": content.pop("schema"), **content}, indent=1, allow_nan=False) + "\n"


def read_facts(bundle: Bundle) -> Facts:
    """The facts of a bundle; empty where it was exported without a report.

    Raises:
        BundleError: not as it was written, or by a newer svdprune.
    """
    if FACTS not in bundle.manifest.files:
        return Facts()
    content = bundle.read_json(FACTS)
    if isinstance(content, dict) and isinstance(content.get("schema"), int) and content["schema"] > SCHEMA:
        raise BundleError(f"{FACTS} was written by a newer svdprune (schema {content['schema']}): upgrade svdprune")
    return read_finite(Facts, content, FACTS, "export the bundle again")


def read_finite(kind: type[T], content: Any, file: str, again: str) -> T:
    """A dataclass from JSON as ``read_fields`` reads it, every number in it finite.

    Raises:
        BundleError: naming the file and the field.
    """
    refuse_odd(content, file, again)
    return read_fields(kind, content, file, again=again)


def refuse_odd(content: Any, file: str, again: str) -> None:
    """JSON of Python may hold NaN, and 1e999 is infinity: neither can be drawn."""
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        where, value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise BundleError(f"{file}: {where or 'the content'} is {value}, it must be a finite number: {again}")
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{where}.{name}" if where else str(name), part) for name, part in inside]
