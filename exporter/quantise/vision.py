"""From a float vision graph to a quantised one: scales, sweep, choice, and what it changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from svdprune.calib.quantise import (
    BlockChange,
    Change,
    Judge,
    Magnitudes,
    Seen,
    Site,
    choose,
    collect_ranges,
    find_sites,
    quantise_all,
    restore_float,
    sweep,
)
from svdprune.calib.quantise.judge import compare
from svdprune.calib.quantise.sites import blocks
from svdprune.calib.quantise.sweep import damage
from svdprune.exporter.quantise.plan import AUTO, NONE, Plan
from svdprune.exporter.vision import EXTERNAL_ABOVE, save_graph
from svdprune.runtime.errors import UserError

Report = Callable[[str, float], None]
"""Called with a stage and the share that is done, 0 to 1."""


@dataclass(frozen=True)
class Quantised:
    """A quantised graph that has been written.

    Attributes:
        opset: of the graph. rule: how activations' ranges were set.
        blocks: names of all blocks; float_blocks: those left in float.
        met: whether the sweep's pictures came within the targets, None where the blocks were not chosen by them.
        sensitivity: what each block alone changed, worst first; empty where that was not asked for.
        change: on the held-out pictures. size_ratio: of the graph, to the float graph.
        plain, seen: what the float and the quantised graph gave for each held-out picture.
    """

    opset: int
    rule: str
    blocks: list[str]
    float_blocks: list[str]
    met: bool | None
    sensitivity: list[BlockChange]
    change: Change
    size_ratio: float
    plain: list[Seen]
    seen: list[Seen]


class Workshop:
    """A folder with the float graph, one that is quantised wholly for each rule, and a graph in between."""

    def __init__(self, folder: Path, graph: ir.Model, plan: Plan) -> None:
        """Write the float graph; `graph` is not held."""
        self.folder, self.plan = folder, plan
        self.plain_path, self.between = folder / "plain.onnx", folder / "between.onnx"
        graph.ir_version = min(graph.ir_version, 10)
        ir.save(graph, self.plain_path, external_data=f"{self.plain_path.name}.data")
        self.plain = onnx.load(str(self.plain_path), load_external_data=False)
        self.sites: list[Site] = find_sites(self.plain.graph, plan.scheme)
        if not self.sites:
            raise UserError(
                "the vision encoder has no layer that can be quantised: export with --precision fp16 or fp32"
            )
        self.blocks = blocks(self.sites)

    def quantise(self, ranges: dict[str, Magnitudes], rule: str, narrow: bool) -> Path:
        """Quantise every site, by one rule for the ranges; `narrow`: integer weights of 7 bits."""
        whole = self._whole(rule)
        quantise_all(self.plain_path, whole, self.sites, ranges, self.plan.scheme, rule, narrow_weights=narrow)
        return whole

    def leave(self, rule: str, float_blocks: Collection[str]) -> Path:
        """The graph quantised by `rule` with these blocks in float; the next call overwrites it."""
        whole = onnx.load(str(self._whole(rule)), load_external_data=False)
        model = restore_float(whole, self.plain, self.sites, float_blocks)
        self.between.write_bytes(model.SerializeToString())
        return self.between

    def _whole(self, rule: str) -> Path:
        return self.folder / f"whole-{rule}.onnx"


def quantise_vision(make: Callable[[], ir.Model], out: Path, plan: Plan, report: Report) -> Quantised:
    """Write the quantised graph to `out` (and `<out>.data` when it is large).

    Args:
        make: builds the float graph, in `plan.float_type`; called once, and its weights are let go once written.
        report: called with each stage, from 0 when `make` has returned.

    Raises:
        UserError: more blocks to leave in float than there are.
        NumericalError: NaN or infinity on a calibration picture.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantise-") as folder:
        shop = Workshop(Path(folder), make(), plan)
        count = int(plan.sensitive) if plan.sensitive not in (AUTO, NONE) else 0
        if count >= len(shop.blocks):
            raise UserError(
                f"--sensitive {count} leaves nothing to quantise: the vision encoder has {len(shop.blocks)} blocks"
            )
        return _quantise(shop, out, count, report)


def _quantise(shop: Workshop, out: Path, count: int, report: Report) -> Quantised:
    plan = shop.plan
    total = len(plan.calibration)
    ranges = collect_ranges(
        shop.plain_path,
        list(dict.fromkeys(site.activation for site in shop.sites)),
        plan.calibration,
        report=lambda done: report(f"measuring activations on {total} pictures", 0.3 * done / total),
    )
    report(f"quantising to {plan.scheme.name}", 0.3)
    judge = Judge(shop.plain_path, plan.swept, as_run=plan.for_cpu)
    narrow = plan.for_cpu and plan.scheme.name == "int8"
    rules = {rule: damage(judge.change(shop.quantise(ranges, rule, narrow))) for rule in plan.scheme.rules}
    rule = min(rules, key=lambda name: rules[name])

    def measure(float_blocks: Collection[str]) -> Change:
        return judge.change(shop.leave(rule, float_blocks))

    order: list[BlockChange] = []
    float_blocks: list[str] = []
    met: bool | None = None
    if plan.sensitive != NONE:
        order = sweep(shop.blocks, measure, lambda share: report("quantising each block alone", 0.4 + 0.4 * share))
        float_blocks = [item.block for item in order[:count]]
    if plan.sensitive == AUTO:
        choice = choose(order, measure, lambda share: report("choosing the blocks left in float", 0.8 + 0.15 * share))
        float_blocks, met = choice.float_blocks, choice.met
    report("writing the quantised vision graph", 0.95)
    opset = _write(shop.leave(rule, float_blocks), out)
    held_out = Judge(shop.plain_path, [fed for fed, _ in plan.held_out], as_run=plan.for_cpu)
    seen = held_out.see(out)
    return Quantised(
        opset,
        rule,
        shop.blocks,
        [block for block in shop.blocks if block in float_blocks],
        met,
        order,
        compare(seen, held_out.reference),
        _size(out) / _size(shop.plain_path),
        held_out.reference,
        seen,
    )


def _write(graph: Path, out: Path) -> int:
    """Write a graph whose weights lie in several files as a bundle's graph is written. Returns its opset."""
    model = ir.load(graph)
    model.metadata_props.clear()
    model.producer_version = None
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    if sum(tensor.nbytes for tensor in weights) <= EXTERNAL_ABOVE:
        ir.external_data.load_to_model(model)
    save_graph(model, out)
    return int(model.opset_imports[""])


def _size(graph: Path) -> int:
    """Bytes of a graph and the weights beside it."""
    return sum(place.stat().st_size for place in graph.parent.glob(f"{graph.name}*"))
