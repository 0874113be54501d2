"""What the user's own pictures decided, read from the bundle: the agreement against K, and the energy curves.

The files belong to ``svdprune.calib``, which a device need not have: here only the fields that the page shows are read.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.report.facts import Energy, refuse_odd

AGAIN = "export the bundle again"


@dataclass(frozen=True)
class Point:
    """One K: share of answers that are the unpruned model's (95 % interval), KL in nats, accuracy where labelled."""

    keep: int
    agreement: float
    low: float
    high: float
    matched: float
    kl: float
    accuracy: float | None


@dataclass(frozen=True)
class Saving:
    """FLOPs, bytes of KV cache and modelled seconds of the prefill; at the chosen K and at all tokens."""

    flops: tuple[float, float]
    cache: tuple[float, float]
    seconds: tuple[float, float] | None


@dataclass(frozen=True)
class Agreement:
    """The search for K by ``--keep auto``."""

    wished: float
    keep: int
    tokens: int
    points: list[Point]
    irregular: list[int]
    unpruned_accuracy: float | None
    questions: int
    pictures: int
    source: str
    saving: Saving | None
    graph: list[Point] = field(default_factory=list)  # the exported vision graph, at each K that one was written for
    bundle: Point | None = None  # both of the bundle's graphs
    unmeasured: str | None = None


@dataclass(frozen=True)
class Calibrated:
    """What ``svdprune calibrate`` found: energy at the tap of the graph, and a line for each tap and centring."""

    energy: list[Energy]
    ranks: list[tuple[str, bool, dict[str, int]]]
    pictures: str
    criterion: str
    settings: dict[str, Any]


def read_agreement(bundle: Bundle) -> Agreement | None:
    """The curve of ``--keep auto``; None where K was given.

    Raises:
        BundleError: the file is not as it was written.
    """
    info = bundle.manifest.calibration
    if info is None or info.keep is None:
        return None
    content = bundle.read_json(info.keep)
    refuse_odd(content, info.keep, AGAIN)
    try:
        saving = content["saving"]
        return Agreement(
            wished=float(content["wished"]),
            keep=int(content["keep"]),
            tokens=int(content["tokens"]),
            points=sorted((_point(point) for point in content["points"]), key=lambda point: point.keep),
            irregular=[int(keep) for keep in content["irregular"]],
            unpruned_accuracy=_number(content["unpruned_accuracy"]),
            questions=int(content["source"]["questions"]),
            pictures=int(content["source"]["pictures"]),
            source=str(content["source"]["description"]),
            saving=None if saving is None else _saving(saving),
            graph=[_point(point) for point in content.get("graph", [])],
            bundle=None if content.get("bundle") is None else _point(content["bundle"]),
            unmeasured=None if content.get("unmeasured") is None else str(content["unmeasured"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BundleError(f"{info.keep} is not a curve of agreement ({error!r}): {AGAIN}") from error


def read_calibrated(bundle: Bundle) -> Calibrated | None:
    """What the calibration of the export found; None without one.

    Raises:
        BundleError: the files are not as they were written.
    """
    info = bundle.manifest.calibration
    if info is None or info.record is None or info.arrays is None:
        return None
    content = bundle.read_json(info.record)
    refuse_odd(content, info.record, AGAIN)
    try:
        own = str(content["features"]["tap"])
        pictures = content["pictures"]
        source, count = str(pictures["description"]), int(pictures["start"])
        with np.load(io.BytesIO(bundle.file(info.arrays).read_bytes()), allow_pickle=False) as arrays:
            curves = {centre: _curve(arrays[f"energy/{own}/{'centred' if centre else 'raw'}"]) for centre in (0, 1)}
        return Calibrated(
            energy=[Energy(bool(centre), curve, count, source) for centre, curve in curves.items()],
            ranks=[
                (str(row["tap"]), bool(row["centre"]), {str(s): int(rank) for s, rank in row["ranks"].items()})
                for row in content["energy"]
            ],
            pictures=f"{count} pictures made the start, {int(pictures['choice'])} chose, "
            f"{int(pictures['judgement'])} judged; {source}",
            criterion=str(content["criterion"]),
            settings=dict(content["settings"]),
        )
    except (KeyError, TypeError, ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{info.record} or its arrays are not a calibration ({error!r}): {AGAIN}") from error


def _curve(array: np.ndarray) -> list[float]:
    curve = np.asarray(array, np.float64)
    if curve.ndim != 1 or not len(curve) or not np.isfinite(curve).all():
        raise ValueError(f"an energy curve of shape {list(curve.shape)}")
    return [float(value) for value in curve]


def _point(content: dict[str, Any]) -> Point:
    agreement, low, high, matched, kl = (float(content[name]) for name in ("agreement", "low", "high", "matched", "kl"))
    return Point(int(content["keep"]), agreement, low, high, matched, kl, _number(content["accuracy"]))


def _saving(content: dict[str, Any]) -> Saving:
    flops, cache = ((float(content[name][0]), float(content[name][1])) for name in ("flops", "cache"))
    seconds = content["seconds"]
    return Saving(flops, cache, (float(seconds[0]), float(seconds[1])) if seconds else None)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
