"""One output of two runs, measured by Polygraphy's comparison functions and the few that it lacks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svdprune.runtime.profile.runners import polygraphy
from svdprune.runtime.verify_metrics import cosines

Value = float | int | str
_NAMES = ("first", "second")


@dataclass(frozen=True)
class Difference:
    """How one output differs: what was measured, the worst of ``steps`` runs, and what is allowed, both by name."""

    output: str
    steps: int
    measured: dict[str, Value]
    allowed: dict[str, Value]
    passed: bool


@dataclass(frozen=True)
class MetricResult:
    """A figure of one output, as Polygraphy's comparator takes it: true when it is allowed."""

    value: float
    passed: bool

    def __bool__(self) -> bool:
        return self.passed


@dataclass(frozen=True)
class Metric:
    """A comparison function for ``Comparator.compare_accuracy``.

    Attributes:
        output: the output that it measures.
        measure: both arrays -> the figure.
        allows: whether a figure is within tolerance.
    """

    output: str
    measure: Callable[[np.ndarray, np.ndarray], float]
    allows: Callable[[float], bool]

    def __call__(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> OrderedDict[str, MetricResult]:
        """The result by the output's name."""
        value = self.measure(first[self.output], second[self.output])
        return OrderedDict({self.output: MetricResult(value, self.allows(value))})


def differences(
    output: str,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    cosine: float,
    rows: bool = False,
    rank: int | None = None,
) -> Difference:
    """Compare an output over all steps by cosine, L2 norm and greatest absolute difference; the worst step counts.

    Args:
        output: its name.
        first, second: the arrays of each step, of equal shapes.
        cosine: least cosine allowed, of the whole array and, with ``rows``, of each vector along the last axis.
        rank: where given, the second run's best entry of the last axis must be among the first's ``rank`` best.
    """
    if [array.shape for array in first] != [array.shape for array in second]:
        raise ValueError(f"{output} has other shapes in the two runs")
    comparator = polygraphy("polygraphy.comparator")
    infinite = float("inf")  # L2 and the greatest difference depend on the model's scale: shown, and not judged
    functions: dict[str, Any] = {
        "cosine": comparator.CosineSimilarityCompareFunc(cosine),
        "L2": comparator.L2CompareFunc(infinite),
        "max error": comparator.SimpleCompareFunc(check_error_stat="max", atol=infinite, rtol=infinite),
    }
    allowed: dict[str, Value] = {"cosine at least": cosine}
    if rows:
        functions["worst row's cosine"] = Metric(output, _worst_row, lambda value: value >= cosine)
    if rank is not None:
        functions["rank of the other's best"] = Metric(output, _rank, lambda value: value <= rank)
        allowed["rank at most"] = rank
    results = comparator.RunResults()
    for name, arrays in zip(_NAMES, (first, second), strict=True):
        results.append((name, [comparator.IterationResult({output: array}, 0.0, name) for array in arrays]))
    accuracy = comparator.Comparator.compare_accuracy(results, compare_func=list(functions.values()))
    measured: dict[str, Value] = {}
    for label, outcome in zip(functions, accuracy, strict=True):
        figures = [_figure(step[output]) for step in outcome[_NAMES]]
        worst = min(figures) if "cosine" in label else max(figures)
        measured[label] = int(worst) if "rank" in label else worst
    return Difference(output, len(first), measured, allowed, bool(accuracy))


def _figure(result: Any) -> float:
    """The figure in a comparison function's result."""
    names = ("value", "cosine_similarity", "l2_norm", "max_absdiff")
    return float(next(getattr(result, name) for name in names if hasattr(result, name)))


def _worst_row(first: np.ndarray, second: np.ndarray) -> float:
    return float(cosines(first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])).min())


def _rank(first: np.ndarray, second: np.ndarray) -> float:
    """The worst place, from 1, that the second's best entry has in the first."""
    best = np.take_along_axis(first, second.argmax(axis=-1)[..., None], axis=-1)
    return float(1 + (first > best).sum(axis=-1).max())
