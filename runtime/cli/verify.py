"""``svdprune verify``: does this machine compute what the checkpoint computes?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.options import backend_options
from svdprune.runtime.cli.show import print_json, print_table
from svdprune.runtime.errors import SvdpruneError

if TYPE_CHECKING:
    from svdprune.runtime.verify import Value, VerifyReport


@click.command("verify", cls=Command, short_help="Replay a bundle's golden case, stage by stage.")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path, vision_backend: str, decoder_backend: str, checkpoint: str | None, threads: int | None, as_json: bool
) -> None:
    """Replay the golden case of BUNDLE: its picture and question, answered at export by the checkpoint itself.

    Leaves with 1 when a stage is out of tolerance.
    """
    from svdprune.runtime.verify import verify

    report = verify(bundle, vision_backend, decoder_backend, threads, checkpoint)
    if as_json:
        print_json({"passed": report.passed, **dataclasses.asdict(report)})
    else:
        _print(report)
    if not report.passed:
        advice = "do not use this bundle here; export it again, with --precision fp32 if it was fp16"
        raise SvdpruneError(f"out of tolerance: {', '.join(report.failed)}: {advice}")


def _print(report: VerifyReport) -> None:
    rows = [
        (
            stage.name,
            _lines(stage.measured),
            _lines(stage.allowed),
            f"{stage.seconds:.3f} s",
            "ok" if stage.passed else "OUT OF TOLERANCE",
        )
        for stage in report.stages
    ]
    backends = f"vision by {report.vision}, decoder by {report.decoder}, reference in {report.reference}"
    print_table(("stage", "measured", "allowed", "time", ""), rows, title=f"{report.bundle}: {backends}")


def _lines(values: dict[str, Value]) -> str:
    numbers = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    return "\n".join(f"{name} {number}" for name, number in zip(values, numbers, strict=True))
