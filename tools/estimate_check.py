"""The roofline model beside published times of Jetson boards, with the error of each figure.

    python -m tools.estimate_check                          # prints the tables
    python -m tools.estimate_check --write docs/estimate.md # and puts them into the page

Leaves with 1 when a figure that the claim is about is not within a factor of two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from transformers import AutoConfig

from svdprune.exporter.estimate import Case, Request, estimate_case, read_model
from svdprune.exporter.estimate.costs import Format, decoder_work, format_of
from svdprune.exporter.estimate.texts import read_text
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.roofline import DEFAULT, Efficiency, machine, stage_time
from svdprune.runtime.targets import find_target
from tools.tables import write_between

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_suffix("").with_name("estimate_published.json").read_text())
FACTOR = 2.0
GRID = [round(0.05 * step, 2) for step in range(4, 21)]  # efficiencies tried: 0.2 to 1
NEW_TOKENS = 100  # of an answer about a COCO picture; decoding hardly depends on it


@dataclass(frozen=True)
class Figure:
    """One published time and the model's, in ms."""

    board: str
    model: str
    stage: str
    published: float
    modelled: float
    quoted: bool = False

    @property
    def ratio(self) -> float:
        """Modelled over published."""
        return self.modelled / self.published

    @property
    def within(self) -> bool:
        return 1 / FACTOR <= self.ratio <= FACTOR


def weight_only(source: dict[str, Any]) -> Format:
    """The published decoders' format: 4-bit weights with FP16 scales in groups of 128, output projection in FP16."""
    kind = source["precision"]
    return Format(kind["decoder"], kind["decoder_bits"], kind["head"], kind["head_bits"])


def case_of(row: dict[str, Any], efficiency: Efficiency = DEFAULT) -> Case:
    """The published run as the model sees it: all vision tokens, nothing selected."""
    picture = tuple(PUBLISHED["picture"])
    model = read_model(row["model"], PUBLISHED["models"][row["model"]], picture=picture)  # type: ignore[arg-type]
    assert model.tokens == PUBLISHED["vision_tokens"]
    on = machine(find_target(row["target"]), row.get("tflops"), row.get("bandwidth"))
    request = Request(PUBLISHED["prompt_rows"] - model.tokens, NEW_TOKENS)
    forms = format_of(PUBLISHED["precision"]["vit"]), weight_only({**PUBLISHED, **row})
    return estimate_case(model, model.tokens, request, on, *forms, SelectorConfig(), efficiency)


def figures(row: dict[str, Any], efficiency: Efficiency = DEFAULT) -> list[Figure]:
    """ViT (its mergers too), prefill and decode of one published row."""
    case, quoted = case_of(row, efficiency), row.get("quoted_ms")
    modelled = {
        "ViT": case.stage("vision").seconds + case.stage("projector").seconds,
        "prefill": case.stage("prefill").seconds,
        "decode": case.stage("decode step").seconds,
    }
    vit, prefill = quoted or (row["vit_ms"], row["prefill_ms"])
    published = {"ViT": vit, "prefill": prefill, "decode": 1e3 / row["decode_tokens_per_second"]}
    board, model = row["target"], row.get("name", row["model"])
    claimed = {"ViT", "prefill"} if quoted else set()
    return [Figure(board, model, s, published[s], 1e3 * modelled[s], s in claimed) for s in modelled]


def text_figures(efficiency: Efficiency = DEFAULT) -> Iterator[Figure]:
    """Time to the first token of a language model alone, by another runtime."""
    for row in PUBLISHED["text_only"]["rows"]:
        text = read_text(AutoConfig.for_model(**PUBLISHED["text_only"]["config"]), tied=False)
        works = decoder_work(text, row["tokens"], 0, 1, weight_only(PUBLISHED))
        seconds = stage_time(works, machine(find_target(row["target"])), efficiency).seconds
        name = f"{PUBLISHED['text_only']['model']}, {row['tokens']} tokens"
        yield Figure(row["target"], name, "prefill", row["first_token_ms"], 1e3 * seconds)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def best_efficiencies() -> tuple[float, float]:
    """The shares, in steps of 0.05, that fit best the rows that are not quoted: (compute, bandwidth)."""
    rows = [row for row in PUBLISHED["rows"] if "quoted_ms" not in row]

    def error(compute: float, bandwidth: float) -> float:
        found = [figure for row in rows for figure in figures(row, Efficiency(compute, bandwidth, DEFAULT.kernel))]
        return sum(math.log(figure.ratio) ** 2 for figure in found)

    return min(((c, b) for c in GRID for b in GRID), key=lambda pair: error(*pair))


def table(found: list[Figure]) -> str:
    """Markdown, a line a figure."""
    lines = ["| board | model | stage | published, ms | model, ms | error | within a factor of two |", "|---" * 7 + "|"]
    lines += [
        f"| {f.board} | {f.model} | {f.stage} | {f.published:.4g} | {f.modelled:.1f} | {f.ratio - 1:+.0%} "
        f"| {'yes' if f.within else '**no**'} |"
        for f in found
    ]
    return "\n".join(lines)


def clocks_table() -> str:
    """The same boards at the clocks that their ratios to one another speak for."""
    lines = ["| board | model | taken as | ViT | prefill | decode |", "|---" * 6 + "|"]
    for other in PUBLISHED["other_clocks"]:
        keys = ("target", "model")
        row = next(row for row in PUBLISHED["rows"] if all(row[key] == other[key] for key in keys))
        errors = " | ".join(f"{figure.ratio - 1:+.0%}" for figure in figures({**row, **other}))
        taken = f"{other['tflops']} TFLOPS, {other['bandwidth']} GB/s ({other['why']})"
        lines.append(f"| {other['target']} | {other['model']} | {taken} | {errors} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Peak memory published for the boards, beside the model's total."""
    lines = ["| board | model | published, GB | model, GB | difference |", "|---" * 5 + "|"]
    for row in PUBLISHED["rows"]:
        if "memory_mb" in row:
            model = read_model(row["model"], PUBLISHED["models"][row["model"]], picture=tuple(PUBLISHED["picture"]))
            request = Request(PUBLISHED["prompt_rows"] - model.tokens, NEW_TOKENS, cache=PUBLISHED["cache_rows"])
            forms = format_of(PUBLISHED["precision"]["vit"]), weight_only(PUBLISHED)
            on = machine(find_target(row["target"]))
            memory = estimate_case(model, model.tokens, request, on, *forms, SelectorConfig()).memory
            published, total = row["memory_mb"] / 1e3, memory.total / 1e9
            figures_of = f"{published:.2f} | {total:.2f} | {published - total:+.2f}"
            lines.append(f"| {row['target']} | {row['model']} | {figures_of} |")
    return "\n".join(lines)


@click.command()
@click.option("--write", "page", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The page.")
def main(page: Path | None) -> None:
    """Print the tables, and with --write put them between the markers of the page."""
    every = [figure for row in PUBLISHED["rows"] for figure in figures(row)]
    quoted = [figure for figure in every if figure.quoted]
    names = {(figure.board, figure.model) for figure in quoted}
    others = [figure for figure in every if not figure.quoted and (figure.board, figure.model) not in names]
    decodes = [figure for figure in every if not figure.quoted and (figure.board, figure.model) in names]
    compute, bandwidth = best_efficiencies()
    fit = (
        f"Least error on the rows of this table: {compute:.0%} of the arithmetic peak and {bandwidth:.0%} of the "
        f"bandwidth. Taken: {DEFAULT.compute:.0%} and {DEFAULT.bandwidth:.0%}. Geometric mean of model over published: "
        f"{geometric_mean([figure.ratio for figure in others]):.2f} here, "
        f"{geometric_mean([figure.ratio for figure in quoted]):.2f} on the eight quoted figures."
    )
    parts = {
        "quoted": table(quoted),
        "fitted": f"{table(others)}\n\n{fit}",
        "others": table(decodes + [f for row in PUBLISHED["finer"] for f in figures(row)] + list(text_figures())),
        "clocks": clocks_table(),
        "memory": memory_table(),
    }
    for name, text in parts.items():
        click.echo(f"{name}\n{text}\n")
        if page is not None:
            write_between(page, name, text)
    failed = [figure for figure in quoted if not figure.within]
    if failed:
        raise SvdpruneError(f"{len(failed)} of {len(quoted)} figures are not within a factor of {FACTOR:g}")


if __name__ == "__main__":
    main()
