"""``svdprune calibrate``: what one's own pictures decide about the selector."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import Steps, print_json, print_table
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require

if TYPE_CHECKING:
    from svdprune.calib.calibration import Calibration

_NEEDS = ("safetensors", "huggingface_hub", "onnx", "onnx_ir", "torch", "transformers")
_LANGUAGE = "model.language_model."


@click.command("calibrate", cls=Command, short_help="What your own pictures decide about the selector.")
@click.argument("model")
@click.option(
    "--images",
    required=True,
    metavar="SPEC",
    help="A folder of pictures (questions.jsonl in it or not), scenes, easy-vqa, hf:ID|FOLDER[:SPLIT], or gqa:, "
    "textvqa:, textvqa+ocr:, pope:, vqav2: and the folder of the published files.",
)
@click.option("--at-least", type=click.IntRange(min=4), default=16, show_default=True, help="Usable pictures wanted.")
@click.option("--limit", type=click.IntRange(min=4), default=64, show_default=True, help="The most pictures.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the choice among them.")
@click.option("--rank", type=click.IntRange(min=1), help="Singular directions in the leverage score.")
@click.option(
    "--variance",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Or as many as hold this share of the variance, on average.  [default: 0.9]",
)
@click.option("--centre/--no-centre", default=None, help="Subtract the mean token or not.  [default: as serves best]")
@click.option(
    "--overlap",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=0.99,
    show_default=True,
    help="Wished, of the kept tokens with those of a float64 SVD.",
)
@click.option("--keep", default="32", show_default=True, metavar="LIST", help="Counts or shares to compare them at.")
@click.option(
    "--budget",
    type=click.Choice(["picture", "tile"]),
    default="picture",
    show_default=True,
    help="As the export will have it, for a model that cuts pictures into tiles.",
)
@click.option("--answers/--no-answers", default=True, show_default=True, help="Ask the language model.")
@click.option(
    "--question",
    "questions",
    multiple=True,
    metavar="TEXT",
    help="Asked about pictures without questions; may be given again.  [default: three general ones]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Longest answer.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where torch runs: cpu, cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder.  [default: ./<model>-calibration]")
@click.option("--overwrite", is_flag=True, help="Replace a calibration that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    images: str,
    at_least: int,
    limit: int,
    seed: int,
    rank: int | None,
    variance: float | None,
    centre: bool | None,
    overlap: float,
    keep: str,
    budget: Literal["picture", "tile"],
    answers: bool,
    questions: tuple[str, ...],
    max_new_tokens: int,
    device: str,
    threads: int | None,
    revision: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Find out, on pictures of yours, how MODEL is best pruned: `svdprune export --calibration` takes the result.

    Half of the pictures make the start of the power iteration and the energy curves; a quarter chooses centring, block
    and iterations; a quarter judges the choice. MODEL is as for `svdprune export`.
    """
    from svdprune.calib.calibration_files import check_place, write_calibration
    from svdprune.calib.sources import DEFAULT_QUESTIONS, open_source

    if rank is not None and variance is not None:
        raise UserError("--rank and --variance exclude each other: give one")
    if at_least > limit:
        raise UserError(f"--at-least {at_least} is more than --limit {limit}: raise the limit")
    if out is not None:
        check_place(out, overwrite)
    for package in _NEEDS:
        require(package, "export", "calibrating")
    speech = require("transformers.utils.logging", "export", "calibrating")
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    torch = require("torch", "export", "calibrating")
    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"torch cannot use {device} here: leave out --device, or install torch with CUDA")
    from svdprune.exporter.calibrate.run import Request, calibrate, remarks
    from svdprune.exporter.evaluate.model import Eyes, Model
    from svdprune.exporter.families import family_of
    from svdprune.exporter.selection import parse_keep
    from svdprune.exporter.source import locate
    from svdprune.exporter.tiles import described

    with Steps() as steps:
        source = open_source(
            images, limit=limit, seed=seed, at_least=at_least, questions=questions or DEFAULT_QUESTIONS
        )
        steps(f"finding {model}", 0.0)
        found = locate(model, revision)
        out = out or Path(f"{found.id.rsplit('/', 1)[-1]}-calibration")
        check_place(out, overwrite)
        speaks = any(name.startswith(_LANGUAGE) for name in found.checkpoint.names())
        if answers and not speaks:
            steps.say("svdprune: note: the checkpoint has no language model, so no answers are compared")
        steps(f"loading {model}", 0.0)
        spec = described(family_of(found.checkpoint.config, model), found.checkpoint, budget)
        eyes: Eyes
        if answers and speaks:
            eyes = Model(found.checkpoint, model, device, lambda note: steps(note, None), spec)
        else:
            eyes = Eyes(found.checkpoint, model, device, spec=spec)
        keeps = tuple(dict.fromkeys(parse_keep(one, eyes.spec.tokens) for one in keep.split(",") if one.strip()))
        request = Request(keeps, rank, variance, centre, overlap, at_least, max_new_tokens)
        record, arrays = calibrate(eyes, found.id, found.revision, source, request, steps, steps.say)
        record = write_calibration(record, arrays, out, overwrite)
    if source.broken:
        click.echo(f"svdprune: note: {source.describe_broken()}", err=True)
    for remark in remarks(record):
        click.echo(f"svdprune: note: {remark}", err=True)
    if as_json:
        print_json({"calibration": str(out), **dataclasses.asdict(record)})
    else:
        _print(record, out, model)


def _print(record: Calibration, out: Path, model: str) -> None:
    """The tables a person decides by, and the next command."""
    shares = sorted(record.energy[0].ranks, key=float)
    print_table(
        ("tap", "features", *(f"{float(share):.0%}" for share in shares), "single pictures"),
        [
            (
                row.tap,
                "centred" if row.centre else "raw",
                *(str(row.ranks[share]) for share in shares),
                f"{row.lowest}-{row.highest} for {row.variance:.0%}",
            )
            for row in record.energy
        ],
        title="directions that hold a share of the variance",
    )
    if record.candidates:
        print_table(
            ("scores", "agreement, 95 %", "tokens", "KL", "- the first, 95 %"),
            [
                (
                    one.label,
                    f"{one.agreement:.3f} {one.low:.2f}-{one.high:.2f}",
                    f"{one.matched:.3f}",
                    f"{one.kl:.3f}",
                    "" if one.difference is None else "{:+.3f} {:+.2f} to {:+.2f}".format(*one.difference),
                )
                for one in record.candidates
            ],
            title=f"answers against the unpruned model's, K = {record.wished.keep[0]}, exact scores",
        )
    names = ("chosen", "defaults, calibrated start", "defaults, seeded start")
    print_table(
        ("", "iterations", "block", "overlap", "worst", "kernels", "MFLOP"),
        [
            (
                name,
                str(trial.iterations),
                str(trial.block),
                f"{trial.overlap:.4f}",
                f"{trial.worst:.3f}",
                str(trial.kernels),
                f"{trial.flops / 1e6:,.0f}",
            )
            for name, trial in zip(names, record.judged, strict=True)
        ],
        title=f"kept tokens against a float64 SVD, {record.pictures.judgement} other pictures",
    )
    settings, pictures = record.settings, record.pictures
    centred = "centred" if settings.centre else "raw"
    click.echo(
        f"settings     rank {settings.rank}, block {settings.block}, iterations {settings.iterations}, {centred}"
    )
    click.echo(
        f"pictures     {pictures.start} made the start, {pictures.choice} chose ({pictures.questions} questions), "
        f"{pictures.judgement} judged" + (f"; {pictures.duplicates} copies left out" if pictures.duplicates else "")
    )
    click.echo(f"criterion    {record.criterion}")
    click.echo(f"calibration  {out}")
    click.echo(f"next         svdprune export {shlex.quote(model)} --keep N --calibration {shlex.quote(str(out))}")
