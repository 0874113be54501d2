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
    from svdprune.runtime.verify_against import Against

OK = {True: "ok", False: "OUT OF TOLERANCE"}


@click.command("verify", cls=Command, short_help="Replay a bundle's golden case, stage by stage.")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_options
@click.option(
    "--against",
    metavar="NAME|BUNDLE",
    help="Compare the backends with this one, too, or with another export of the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
    against: str | None,
    as_json: bool,
) -> None:
    """Replay the golden case of BUNDLE: its picture and question, answered at export by the checkpoint itself.

    With --against, also compare output by output what the chosen backends and another one compute, by Polygraphy's
    comparator (extra `profile`): `--vision-backend tensorrt --against onnxruntime`. A folder is another bundle of the
    same model, run by ONNX Runtime.

    Leaves with 1 when something is out of tolerance.
    """
    from svdprune.runtime.verify import verify

    own = checkpoint if decoder_backend == "transformers" or against is None else None
    report = verify(bundle, vision_backend, decoder_backend, threads, own)
    other = None
    if against is not None:
        from svdprune.runtime.verify_against import verify_against

        other = verify_against(bundle, against, vision_backend, decoder_backend, threads, checkpoint, verify=False)
    passed = report.passed and (other is None or other.passed)
    if as_json:
        compared = {} if other is None else {"against": {"passed": other.passed, **dataclasses.asdict(other)}}
        print_json({"passed": passed, **dataclasses.asdict(report), **compared})
    else:
        _print(report)
        if other is not None:
            _print_against(other)
    if not report.passed:
        advice = "do not use this bundle here; export it again, with --precision fp32 if it was fp16"
        raise SvdpruneError(f"out of tolerance: {', '.join(report.failed)}: {advice}")
    if other is not None and not other.passed:
        advice = "one of the two is wrong here; the table above has the golden case of the first"
        raise SvdpruneError(f"the two differ beyond tolerance: {', '.join(other.failed)}: {advice}")


def _print(report: VerifyReport) -> None:
    rows = [
        (stage.name, _lines(stage.measured), _lines(stage.allowed), f"{stage.seconds:.3f} s", OK[stage.passed])
        for stage in report.stages
    ]
    backends = f"vision by {report.vision}, decoder by {report.decoder}, reference in {report.reference}"
    print_table(("stage", "measured", "allowed", "time", ""), rows, title=f"{report.bundle}: {backends}")


def _print_against(other: Against) -> None:
    rows = [
        (found.output, str(found.steps), _lines(found.measured), _lines(found.allowed), OK[found.passed])
        for found in other.differences
    ]
    title = f"{other.ours}\nagainst {other.theirs}; the worst step counts"
    print_table(("output", "steps", "measured", "allowed", ""), rows, title=title)


def _lines(values: dict[str, Value]) -> str:
    numbers = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    return "\n".join(f"{name} {number}" for name, number in zip(values, numbers, strict=True))
