"""The tables of docs/targets.md, from the rows of ``runtime.targets`` and ``runtime.traps``.

python -m tools.targets_page                 print them
python -m tools.targets_page --write FILE    put them into the page
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from svdprune.runtime.targets import RELEASES, TARGETS, Release, Target
from svdprune.runtime.traps import TRAPS, Trap, parse_version
from tools.tables import write_between

SECTIONS = ("targets", "precisions", "releases", "rules")


def sections() -> dict[str, str]:
    """The page's tables by the names of their markers, Markdown."""
    return {
        "targets": _table(
            ("target", "device", "sm", "memory, GB", "GB/s", "fp16", "int8", "fp8", "fp4", "figures from"),
            map(_target, TARGETS.values()),
        ),
        "precisions": _table(
            ("target", "precisions", "releases", "opset, at most", "TensorRT-RTX", "note"),
            map(_software, TARGETS.values()),
        ),
        "releases": _table(
            ("release", "TensorRT", "CUDA", "Python", "opset, at most"),
            ((r.name, r.tensorrt, _or_dash(r.cuda), _or_dash(r.python), str(r.opset)) for r in RELEASES),
        ),
        "rules": _table(("rule", "what is refused", "instead", "holds for", "known from"), map(_rule, TRAPS)),
    }


def _target(row: Target) -> Sequence[str]:
    memory = "-" if row.memory_gb is None else f"{row.memory_gb}{' shared' if row.memory_shared else ''}"
    peaks = (row.fp16_tflops, row.int8_tops, row.fp8_tflops, row.fp4_tflops)
    figures = map(_or_dash, (row.bandwidth_gbs, *peaks))
    return f"`{row.name}`", row.device, _or_dash(row.sm), memory, *figures, row.source or "-"


def _software(row: Target) -> Sequence[str]:
    releases = ", ".join(release.name for release in row.releases) or "-"
    rtx = "yes" if row.tensorrt_rtx else "-"
    return f"`{row.name}`", ", ".join(row.precisions), releases, _or_dash(row.opset_ceiling), rtx, row.note or "-"


def _rule(trap: Trap) -> Sequence[str]:
    return f"`{trap.name}`", trap.sentence, trap.remedy, _span(trap), trap.source


def _span(trap: Trap) -> str:
    """The releases that a rule holds for, in words, then those of the table."""
    if trap.rtx_only:
        return "TensorRT-RTX"
    first, last = (".".join(map(str, version)) if version else None for version in (trap.first, trap.last))
    holding = [release for release in _by_version() if trap.holds(parse_version(release.tensorrt))]
    if len(holding) == len(_by_version()):
        return "all"
    words = f"up to {last}" if last else f"from {first}"
    return f"{words} ({', '.join(release.tensorrt for release in holding)})"


def _by_version() -> list[Release]:
    """One release of each TensorRT version, the oldest first."""
    return sorted({parse_version(r.tensorrt): r for r in RELEASES}.values(), key=lambda r: parse_version(r.tensorrt))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


@click.command()
@click.option("--write", "page", type=click.Path(path_type=Path, exists=True), help="Fill this page's tables.")
def main(page: Path | None) -> None:
    """Print or write the tables of docs/targets.md."""
    for name, text in sections().items():
        if page is None:
            click.echo(f"{text}\n")
        else:
            write_between(page, name, text)


if __name__ == "__main__":
    main()
