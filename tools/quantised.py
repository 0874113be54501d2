"""What an 8-bit vision graph changes: tokens, kept sets, answers, size and CPU time, against the float graph.

    python -m tools.quantised --model mini-llava --keep 32 --write docs/quantisation.md

Exports the model in each precision, then asks every vision graph about the same held-out drawn scenes; the answers are
written by one float32 decoder, so that nothing but the vision graph differs. `as written` computes each Q, DQ and
product as the graph says, in float32, which is what an engine with exact 8-bit products gives; `integer kernels` is
ONNX Runtime's way on this CPU. Times are one thread, the graphs in turn, picture by picture.
"""

from __future__ import annotations

import itertools
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnxruntime
from rich.progress import track

from svdprune.calib.quantise import Judge, Magnitudes, collect_ranges
from svdprune.calib.quantise.judge import open_quantised
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.processor import image_values
from svdprune.exporter.quantise import plan_quantisation
from svdprune.exporter.quantise.vision import Workshop
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.source import locate
from svdprune.exporter.vision import build_vision
from svdprune.runtime import load
from svdprune.runtime.answer import Sight
from svdprune.runtime.manifest import QuantisationInfo
from svdprune.runtime.preprocess import ImageSettings, preprocess
from svdprune.runtime.targets import find_target
from svdprune.runtime.verify_metrics import cosines
from svdprune.runtime.vlm import Vlm
from tools.parity import questions
from tools.tables import write_between

OUTPUTS = ["features", "kept_indices", "scores"]


@dataclass(frozen=True)
class Case:
    """A graph and the way it is run."""

    name: str
    precision: str
    target: str
    as_run: bool


CASES = (
    Case("fp32", "fp32", "cpu", True),
    Case("int8 for a CPU, integer kernels", "int8", "cpu", True),
    Case("int8 for a GPU, as written", "int8", "jetson-orin", False),
    Case("fp8 for a GPU, as written", "fp8", "rtx-40", False),
)


@dataclass
class Seen:
    """One case over all questions."""

    cosine: list[float] = field(default_factory=list)  # of the features of tokens that both keep
    overlap: list[float] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)  # of the last question
    sight: Sight | None = None


def export_all(model: str, keep: str, folder: Path) -> dict[tuple[str, str], Path]:
    """A bundle of each precision and target that a case wants."""
    bundles = {}
    for precision, target in {(case.precision, case.target): None for case in CASES}:
        click.echo(f"exporting {precision} for {target}")
        out = folder / f"{precision}-{target}"
        export_model(ExportRequest(model, keep, target, out, precision=precision, decoder_engine="none"))
        bundles[precision, target] = out
    return bundles


def measure(bundles: dict[tuple[str, str], Path], count: int, seed: str, limit: int) -> dict[str, Seen]:
    """Every case on the same questions, the first case being the reference."""
    vlm = load(bundles["fp32", "cpu"], threads=1)
    sessions = {
        case.name: open_quantised(bundles[case.precision, case.target] / "vision.onnx", 1, case.as_run)
        for case in CASES
    }
    tallies = {case.name: Seen() for case in CASES}
    for image, question in track(questions(count, seed), "questions"):
        pixels = preprocess(image, vlm.settings)
        for case in CASES:
            ask(vlm, sessions[case.name], pixels, question, tallies[case.name], tallies[CASES[0].name], limit)
    return tallies


def ask(vlm: Vlm, session: Any, pixels: np.ndarray, question: Any, tally: Seen, reference: Seen, limit: int) -> None:
    """One question to one case."""
    began = time.perf_counter()
    features, kept, scores = (value[0] for value in session.run(OUTPUTS, {"pixels": pixels[None]}))
    tally.seconds.append(time.perf_counter() - began)
    tally.sight = sight = Sight(features, kept, scores, pixels)
    answer = vlm.ask(sight, question.text, max_new_tokens=limit, temperature=0.0)
    tally.answer = answer.token_ids
    assert reference.sight is not None
    _, ours, theirs = np.intersect1d(kept, reference.sight.kept_indices, return_indices=True)
    if len(ours):
        tally.cosine.append(float(cosines(features[ours], reference.sight.features[theirs]).mean()))
    tally.overlap.append(len(ours) / len(kept))
    tally.first.append(tally.answer[:1] == reference.answer[:1])
    tally.same.append(tally.answer == reference.answer)
    tally.right.append(answer.text.strip() == question.answer)


def main_table(tallies: dict[str, Seen], bundles: dict[tuple[str, str], Path]) -> str:
    """A row a case."""
    lines = [
        "| vision graph | blocks in float | cosine, mean / worst | kept set, mean / worst | same first token "
        "| same answer | right | size | CPU time |",
        "|---" * 9 + "|",
    ]
    plain = tallies[CASES[0].name]
    size = _size(bundles[CASES[0].precision, CASES[0].target])
    for case in CASES:
        t, bundle = tallies[case.name], bundles[case.precision, case.target]
        info = load(bundle, verify=False).manifest.vision.quantisation
        left = "all" if info is None else f"{len(info.float_blocks)} of {info.blocks}"
        ratio = median(a / b for a, b in zip(t.seconds, plain.seconds, strict=True))
        lines.append(
            f"| {case.name} | {left} | {np.mean(t.cosine):.5f} / {min(t.cosine):.4f} "
            f"| {np.mean(t.overlap):.3f} / {min(t.overlap):.3f} | {np.mean(t.first):.3f} | {np.mean(t.same):.3f} "
            f"| {np.mean(t.right):.3f} | {_size(bundle) / size:.2f} | {f'{ratio:.2f}' if case.as_run else '-'} |"
        )
    return "\n".join(lines)


def block_table(bundles: dict[tuple[str, str], Path]) -> str:
    """A row a block: what quantising it alone changed, as the manifests say."""
    infos: dict[str, QuantisationInfo] = {}
    for (precision, target), bundle in bundles.items():
        info = load(bundle, verify=False).manifest.vision.quantisation
        if info is not None:
            infos[f"{precision}, {target}"] = info
    heads = [f"{name}: 1 - cosine | kept set" for name in infos]
    lines = [f"| block | {' | '.join(heads)} |", "|---" * (1 + 2 * len(infos)) + "|"]
    names = sorted({item.block for info in infos.values() for item in info.sensitivity})
    for name in names:
        cells = []
        for info in infos.values():
            found = next((item for item in info.sensitivity if item.block == name), None)
            left = " (float)" if name in info.float_blocks else ""
            cells.append(f"{1 - found.cosine:.1e}{left} | {found.overlap:.3f}" if found else "not quantised | ")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def rule_tables(model: str, keep: int) -> tuple[str, str]:
    """All blocks quantised, on pictures that set no range: by each rule; and with 8 or 7 bits of weights on a CPU."""
    checkpoint = locate(model, None).checkpoint
    family = family_of(checkpoint.config, model)
    spec, images = family.describe(checkpoint), ImageSettings.from_json(image_values(checkpoint))
    rules = ["| scheme | rule for ranges | cosine of the tokens | kept set, mean / worst |", "|---|---|---|---|"]
    bits = ["| int8 weights | run | cosine of the tokens | kept set, mean / worst |", "|---|---|---|---|"]
    for precision, target in (("int8", "cpu"), ("fp8", "rtx-40")):
        plan = plan_quantisation(precision, find_target(target), None, None, images, spec, True, 0)
        assert plan is not None
        with tempfile.TemporaryDirectory() as folder:
            graph = build_vision(checkpoint, family, spec, SelectorConfig(), keep, precision=plan.float_type)
            shop = Workshop(Path(folder), graph, plan)
            tensors = list(dict.fromkeys(site.activation for site in shop.sites))
            ranges = collect_ranges(shop.plain_path, tensors, plan.calibration)
            judge = Judge(shop.plain_path, [fed for fed, _ in plan.held_out])
            for rule in plan.scheme.rules:
                rules.append(f"| {precision} | {rule} | {changed(shop, judge, ranges, rule)}")
            if plan.for_cpu:
                for narrow, as_run in itertools.product((False, True), (False, True)):
                    name = f"{7 if narrow else 8} bits | {'integer kernels' if as_run else 'as written'}"
                    bits.append(f"| {name} | {changed(shop, judge, ranges, 'mse', narrow, as_run)}")
    return "\n".join(rules), "\n".join(bits)


def changed(
    shop: Workshop, judge: Judge, ranges: dict[str, Magnitudes], rule: str, narrow: bool = False, as_run: bool = False
) -> str:
    """Two cells: what quantising every block changes."""
    judge.as_run = as_run
    change = judge.change(shop.quantise(ranges, rule, narrow))
    return f"{change.cosine:.5f} | {change.overlap:.3f} / {change.worst_overlap:.3f} |"


def setting(model: str, bundles: dict[tuple[str, str], Path], count: int, seed: str) -> str:
    """What was measured on what."""
    manifest = load(bundles["fp32", "cpu"], verify=False).manifest
    info = load(bundles["int8", "cpu"], verify=False).manifest.vision.quantisation
    assert info is not None
    vision = manifest.vision
    return (
        f"`{model}`, weights {(manifest.model.sha256 or '')[:12]}, K = {vision.keep} of {vision.tokens} by "
        f"{vision.selector.name}; {count} questions, seed `{seed}`; scales from {info.calibrated_on} pictures of "
        f"`{info.source}`, blocks chosen on {info.swept_on} others. {cpu()}, one thread; onnxruntime "
        f"{onnxruntime.__version__}."
    )


def cpu() -> str:
    """The CPU's name and its vector instructions, where Linux tells."""
    info = Path("/proc/cpuinfo")
    lines = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (info.read_text(encoding="utf-8").splitlines() if info.exists() else [])
        if ":" in line
    )
    kinds = [name for name in ("avx2", "avx512f", "avx_vnni", "avx512_vnni") if name in lines.get("flags", "").split()]
    return f"{lines.get('model name', platform.machine())} ({', '.join(kinds) or 'vector instructions unknown'})"


def _size(bundle: Path) -> int:
    return sum(place.stat().st_size for place in bundle.glob("vision.onnx*"))


@click.command(help=__doc__)
@click.option("--model", default="mini-llava", show_default=True)
@click.option("--keep", default=32, show_default=True)
@click.option("--questions", "count", default=210, show_default=True)
@click.option("--seed", default="quantised", show_default=True, help="Training and calibration draw from other seeds.")
@click.option("--max-new-tokens", "limit", default=16, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose tables are replaced.")
def main(model: str, keep: int, count: int, seed: str, limit: int, write: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundles = export_all(model, str(keep), Path(folder))
        tallies = measure(bundles, count, seed, limit)
        rules, bits = rule_tables(model, keep)
        parts = {
            "quantised-setting": setting(model, bundles, count, seed),
            "quantised": main_table(tallies, bundles),
            "quantised-blocks": block_table(bundles),
            "quantised-rules": rules,
            "quantised-bits": bits,
        }
    for name, text in parts.items():
        click.echo(f"\n{text}")
        if write is not None:
            write_between(write, name, text)


if __name__ == "__main__":
    main()
