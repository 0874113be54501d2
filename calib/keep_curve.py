"""`keep.json` of a bundle: agreement against K, and the K that was chosen by it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields

SCHEMA = 1


@dataclass(frozen=True)
class KeepPoint:
    """One K: answers against the unpruned model's.

    `agreement`: share of greedy answers that are the same token for token, with its 95 % interval; `matched`: mean
    share of an answer's tokens before the first that differs; `kl`: of the first token's distribution, nats; `accuracy`
    where the questions have labels.
    """

    keep: int
    agreement: float
    low: float
    high: float
    matched: float
    kl: float
    accuracy: float | None = None


@dataclass(frozen=True)
class KeepSource:
    """The questions: where from, how many, what could not be used; `limit`: the most tokens of an answer."""

    spec: str
    description: str
    seed: int
    pictures: int
    questions: int
    limit: int
    broken: list[str]


@dataclass(frozen=True)
class Saving:
    """What K tokens save of the language model's work, by counting: prefill FLOPs and bytes of KV cache, K and all T.

    `seconds`: of the prefill by a roofline model of the target, K and all T; empty for a target without peaks.
    """

    flops: list[float]
    cache: list[int]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class KeepCurve:
    """The search for K.

    Attributes:
        wished: agreement asked for. keep: the answer. tokens: T. grid: the K that were to choose from.
        points: what was measured, ascending.
        irregular: K that agree though a larger one does not, so they were not taken.
        prompt_tokens: text tokens of a prompt, mean; what `saving` counts with.
        rows: that a picture has in the prompt at K and unpruned, mean: tokens, and what stands between them.
        precision: of the exported vision graph. graph: answers from its features, by the reference language model, at
            each K that one was written for; the last is the bundle's.
        decoder: precision of the bundle's decoder. bundle: answers by the bundle's own two graphs as ONNX Runtime runs
            them here, None where `unmeasured` says why not.
    """

    wished: float
    keep: int
    tokens: int
    grid: list[int]
    points: list[KeepPoint]
    irregular: list[int]
    unpruned_accuracy: float | None
    positions: str
    prompt_tokens: int
    source: KeepSource
    saving: Saving | None = None
    rows: list[int] = field(default_factory=list)
    precision: str | None = None
    graph: list[KeepPoint] = field(default_factory=list)
    decoder: str | None = None
    bundle: KeepPoint | None = None
    unmeasured: str | None = None
    written_by: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def chosen(self) -> KeepPoint:
        """The point of `keep`."""
        return next(point for point in self.points if point.keep == self.keep)

    def to_json(self) -> str:
        """Indented JSON, schema first."""
        content = dataclasses.asdict(self)
        return json.dumps({"schema": content.pop("schema"), **content}, indent=2, allow_nan=False) + "\n"


def read_keep_curve(path: Path) -> KeepCurve:
    """Read `keep.json`.

    Raises:
        BundleError: it cannot be read, or a field is missing, unknown or mistyped.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read or is not valid JSON ({error}): export the bundle again") from error
    found = read_fields(KeepCurve, content, str(path))
    if found.schema != SCHEMA or found.keep not in [point.keep for point in found.points]:
        raise BundleError(f"{path}: schema {found.schema} and keep {found.keep} do not fit: export the bundle again")
    return found
