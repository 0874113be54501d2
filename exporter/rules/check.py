"""A graph against the rules of a TensorRT release, and against all releases of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

from svdprune.exporter.rules.predicates import PREDICATES
from svdprune.exporter.rules.view import Site, View, view_of
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import Release, Target, opset_limit
from svdprune.runtime.traps import OLDEST, OLDEST_OPSET, TENSORRT, TENSORRT_RTX, TRAPS, Trap, Version, parse_version

MAX_RANK = 8
DECODER_OPERATORS = ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter")  # of the decoder for engines
_OWN_DOMAINS = ("", "ai.onnx")
_REFUSED_TYPES = frozenset(
    getattr(TensorProto, name) for name in ("INT16", "UINT16", "UINT32", "UINT64", "STRING", "COMPLEX64", "COMPLEX128")
)


@dataclass(frozen=True)
class Violation:
    """A rule that a graph breaks.

    Attributes:
        where: the node, tensor or graph, as a person finds it.
        rule: the rule's name in ``runtime.traps``.
        sentence: the rule.
        detail: what is wrong in this place.
        remedy: what avoids it, a command-line option where there is one.
    """

    where: str
    rule: str
    sentence: str
    detail: str
    remedy: str

    def __str__(self) -> str:
        said = self.sentence.rstrip(".")
        return f"{self.where} breaks the rule {self.rule} ({said}; {self.detail}): {self.remedy}"


def check_graph(
    model: onnx.ModelProto | ir.Model | str | Path, version: str, runtime: str = TENSORRT
) -> list[Violation]:
    """Everything in a graph that a TensorRT release would refuse, or read in another sense.

    Bodies of Loop, Scan and If and the model's own functions are looked at too. Weights stay on the disk.

    Args:
        model: a model, or the path of a file.
        version: of TensorRT ("10.3"). For TensorRT-RTX the newest TensorRT whose rules it shares ("11.4").
        runtime: "tensorrt" or "tensorrt_rtx".

    Raises:
        UserError: a release older than the table.
    """
    at = parse_version(version)
    if at < OLDEST:
        raise UserError(
            f"the rules begin with TensorRT {OLDEST[0]}.{OLDEST[1]} and say nothing of {version}: "
            "choose a target with a newer release"
        )
    return _check(_look(model), at, runtime)


def check_target(
    model: onnx.ModelProto | ir.Model | str | Path, target: Target, releases: tuple[Release, ...] | None = None
) -> dict[str, list[Violation]]:
    """What each release of a target refuses, by the release's title; empty lists where it takes the graph.

    Args:
        releases: those to ask, where not all of the target's. TensorRT-RTX, which runs on some targets' GPUs, is asked
            as well where the newest of the target's releases is.
    """
    asked = target.releases if releases is None else releases
    if not asked:
        return {}
    view = _look(model)
    found = {}
    for release in asked:
        found[release.title] = _check(view, parse_version(release.tensorrt), TENSORRT)
    if target.tensorrt_rtx and target.releases[-1] in asked:
        found["TensorRT-RTX"] = _check(view, parse_version(target.releases[-1].tensorrt), TENSORRT_RTX)
    return found


def releases_with(target: Target, operators: tuple[str, ...]) -> tuple[Release, ...]:
    """Those releases of a target whose TensorRT knows the operators at all, the oldest first."""

    def lacks(release: Release) -> bool:
        refused = (t for t in TRAPS if t.name not in PREDICATES and t.holds(parse_version(release.tensorrt)))
        return any(operator in trap.operators for trap in refused for operator in operators)

    return tuple(release for release in target.releases if not lacks(release))


def refuse_violations(found: dict[str, list[Violation]], graph: str, target: Target) -> None:
    """Raise a ``UserError`` that names node, rule and remedy of the first violation and counts the others.

    Args:
        found: of ``check_target``.
        graph: what was checked, "vision graph".
    """
    broken = {name: violations for name, violations in found.items() if violations}
    if not broken:
        return
    name, violations = next(iter(broken.items()))
    others = len({(v.where, v.rule) for vs in broken.values() for v in vs}) - 1
    more = f" (and {others} more of the kind)" if others else ""
    raise UserError(f"the {graph} cannot become an engine on {target.name}: for {name}, {violations[0]}{more}")


def _look(model: onnx.ModelProto | ir.Model | str | Path) -> View:
    if isinstance(model, str | Path):
        return view_of(onnx.load(model, load_external_data=False), Path(model).parent)
    return view_of(ir.to_proto(model) if isinstance(model, ir.Model) else model)


def _check(view: View, version: Version, runtime: str) -> list[Violation]:
    found: list[Violation] = []
    for trap in TRAPS:
        if trap.holds(version, runtime):
            look = _WHOLE.get(trap.name, _nodes)
            found += [
                Violation(where, trap.name, trap.sentence, detail, trap.remedy)
                for where, detail in look(view, trap, version)
            ]
    return found


Found = Iterator[tuple[str, str]]
"""Place and what is wrong there."""


def _nodes(view: View, trap: Trap, version: Version) -> Found:
    """Rules of single nodes: by the rule's predicate, or by the operator alone where it has none."""
    predicate = PREDICATES.get(trap.name)
    for site in view.sites:
        if trap.operators and site.op not in trap.operators:
            continue
        if predicate is None:
            yield site.label, "it is here"
        elif _foreign(site) is None and (detail := predicate(site)):
            yield site.label, detail


def _foreign(site: Site) -> str | None:
    """The domain of a node that is not of ONNX's own set."""
    return None if site.node.domain in _OWN_DOMAINS else str(site.node.domain)


def _domain(view: View, trap: Trap, version: Version) -> Found:
    refused = {operator for other in TRAPS if other.name not in PREDICATES for operator in other.operators}
    for site in view.sites:
        domain = _foreign(site)
        if domain and (domain, site.op) not in view.functions and site.op not in refused:
            yield site.label, f"its domain is {domain}"


def _opset(view: View, trap: Trap, version: Version) -> Found:
    limit = opset_limit(version)
    if not OLDEST_OPSET <= view.main.opset <= limit:
        yield "the graph", f"its opset is {view.main.opset} and must lie between {OLDEST_OPSET} and {limit}"


def _rank(view: View, trap: Trap, version: Version) -> Found:
    for scope in view.scopes:
        for name, shape in scope.shapes.items():
            if len(shape) > MAX_RANK:
                yield f"tensor '{name}'{scope.where}", f"it has {len(shape)} dimensions"


def _types(refused: frozenset[int]) -> Callable[[View, Trap, Version], Found]:
    def look(view: View, trap: Trap, version: Version) -> Found:
        for scope in view.scopes:
            for name, kind in scope.types.items():
                if kind in refused:
                    yield f"tensor '{name}'{scope.where}", f"it is {TensorProto.DataType.Name(kind).lower()}"

    return look


# Rules about more than a node.
_WHOLE: dict[str, Callable[[View, Trap, Version], Any]] = {
    "domain": _domain,
    "opset": _opset,
    "rank": _rank,
    "type": _types(_REFUSED_TYPES),
    "double": _types(frozenset({TensorProto.DOUBLE})),
}
WHOLE = frozenset(_WHOLE)
