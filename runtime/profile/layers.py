"""Time of every layer of a vision graph, whichever backend measured it, and which part of the graph it belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svdprune.runtime.profile.stats import Summary

ENCODER, SELECTION, PROJECTOR, UNKNOWN = "encoder", "selection", "projector", "unknown"
PARTS = (ENCODER, SELECTION, PROJECTOR)
NEGLIGIBLE = 0.02  # of all time: what layers that cannot be told apart may take before the selection counts as unknown
_PREFIXES = {"scorer/": SELECTION, "select/": SELECTION, "projector/": PROJECTOR}  # the exporter's names of nodes


@dataclass(frozen=True)
class Layer:
    """One layer. ``seconds`` is the median of its runs, ``share`` of all layers' time (0 to 1)."""

    name: str
    operator: str
    part: str
    seconds: float
    share: float


@dataclass(frozen=True)
class LayerTable:
    """Every layer, slowest first, and the same time by part and by operator.

    Attributes:
        source: what measured it.
        layers: all of them.
        parts: encoder, selection, projector, "encoder + selection" where a layer of the engine does both, and "unknown"
            where it does not say what it is made of: summaries of their sums in each run.
        operators: seconds of each operator, slowest first.
        runs: how many runs were measured.
    """

    source: str
    layers: list[Layer]
    parts: dict[str, Summary]
    operators: dict[str, float] = field(default_factory=dict)
    runs: int = 0

    @property
    def selection(self) -> Summary | None:
        """Time of the selection; None where there is none, or layers that may do part of it take noticeable time."""
        unclear = (part == UNKNOWN or (SELECTION in part and part != SELECTION) for part in self.parts)
        lost = sum(summary.median for summary, lost in zip(self.parts.values(), unclear, strict=True) if lost)
        whole = sum(summary.median for summary in self.parts.values())
        return None if lost > NEGLIGIBLE * whole else self.parts.get(SELECTION)


def part_of(nodes: Sequence[str]) -> str:
    """The part of a layer made of these ONNX nodes; several are joined with a plus, none is unknown."""
    found = {_part_of_node(node) for node in nodes}
    return " + ".join(part for part in PARTS if part in found) or UNKNOWN


def layer_table(
    source: str, runs: Sequence[Mapping[str, float]], operators: Mapping[str, str], nodes: Mapping[str, Sequence[str]]
) -> LayerTable:
    """Sum up runs.

    Args:
        source: what measured.
        runs: of each run, seconds by the layer's name. One run or more.
        operators: the layer's kind, by its name.
        nodes: the ONNX nodes that a layer is made of, where it is known; a layer that is not in it is a node itself.
    """
    names = list(dict.fromkeys(name for run in runs for name in run))
    part = {name: part_of(nodes.get(name, [name])) for name in names}
    medians = {name: Summary.of([run.get(name, 0.0) for run in runs]).median for name in names}
    whole = sum(medians.values()) or 1.0
    layers = [Layer(name, operators.get(name, ""), part[name], medians[name], medians[name] / whole) for name in names]
    layers.sort(key=lambda layer: -layer.seconds)
    by_operator: defaultdict[str, float] = defaultdict(float)
    for layer in layers:
        by_operator[layer.operator] += layer.seconds
    return LayerTable(
        source=source,
        layers=layers,
        parts={name: Summary.of([_sum(run, part, name) for run in runs]) for name in dict.fromkeys(part.values())},
        operators=dict(sorted(by_operator.items(), key=lambda item: -item[1])),
        runs=len(runs),
    )


def _part_of_node(node: str) -> str:
    return next((part for prefix, part in _PREFIXES.items() if node.startswith(prefix)), ENCODER)


def _sum(run: Mapping[str, float], part: Mapping[str, str], wanted: str) -> float:
    return sum(seconds for name, seconds in run.items() if part[name] == wanted)
