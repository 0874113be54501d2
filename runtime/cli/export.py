"""``svdprune export`` (and ``svdprune-export``): a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.export_summary import print_summary
from svdprune.runtime.cli.show import Steps
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.machine import resolve_target
from svdprune.runtime.targets import AUTO, check_precision

if TYPE_CHECKING:
    from svdprune.runtime.manifest import Positions

# The slow imports come last, so that a missing package is told at once.
_NEEDS = ("safetensors", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "torch", "transformers")


@click.command(
    "export",
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="A checkpoint to a bundle, vision tokens pruned inside the graph.",
)
@click.argument("model")
@click.option("--keep", metavar="N|P%|auto", help="Vision tokens to keep: a count (32), a share (10%), or a search.")
@click.option(
    "--agreement",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="auto: wished share of answers that are the unpruned model's.  [default: 0.98]",
)
@click.option(
    "--images",
    metavar="SPEC",
    help="auto: pictures and questions, as for `svdprune evaluate`.  [default: the calibration's, or drawn scenes]",
)
@click.option("--pictures", type=click.IntRange(min=4), help="auto: the most pictures.  [default: 64]")
@click.option(
    "--question",
    "questions",
    multiple=True,
    metavar="TEXT",
    help="auto: asked about pictures without questions; may be given again.  [default: three general ones]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="auto: longest answer compared.  [default: 32]")
@click.option("--target", default=AUTO, show_default=True, help="Where it will run; `svdprune targets` lists them.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle.  [default: ./<model>-k<keep>-<target>]")
@click.option(
    "--select",
    metavar="NAME",
    help="Selector put in the graph: leverage (the paper's rule), leverage-grid, leverage-dpp, cls, norm, random, "
    "grid, maxmin, dpp, none.  [default: leverage-grid, which kept more answers than leverage where they could be told "
    "apart; leverage where the number of tokens varies]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Made by `svdprune calibrate`: its start, rank, block, iterations and centring, where not given here.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Singular directions in the leverage score.  [default: 16]")
@click.option(
    "--variance",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Choose the rank for each picture: as many directions as hold this share of the variance.",
)
@click.option("--block", type=click.IntRange(min=1), help="Columns iterated together.  [default: by the rank]")
@click.option("--iterations", type=click.IntRange(min=1), help="Rounds of power iteration.  [default: by the block]")
@click.option(
    "--centre/--no-centre", default=None, help="Subtract the mean token first.  [default: no, or the calibration's]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the start and of `random`.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "fp8"]),
    default="fp32",
    show_default=True,
    help="Of the vision encoder; the selection is always fp32. What int8 and fp8 leave is fp32 on a CPU, else fp16.",
)
@click.option(
    "--calibration-images",
    metavar="SPEC",
    help="Pictures that set the scales of int8 and fp8: a folder, or a source by name.  [default: drawn scenes]",
)
@click.option(
    "--sensitive",
    metavar="auto|none|N",
    help="Blocks that int8 and fp8 leave in float: as few as keep the choice of tokens, or N.  [default: auto]",
)
@click.option(
    "--decoder-precision",
    type=click.Choice(["fp32", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the language model's weights, as ONNX Runtime runs it.",
)
@click.option(
    "--decoder-engine",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="auto: also write the fp16 decoder graph that engines are built from, where the target's TensorRT can.",
)
@click.option(
    "--cache",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of the decoder engine's KV cache, prompt and answer together.  [default: 2048, at most the context]",
)
@click.option(
    "--positions",
    type=click.Choice(["compact", "original"]),
    help="Positions of the kept tokens: side by side, or where they stood in the picture.  "
    "[default: compact; original where a position is a time, a row and a column]",
)
@click.option(
    "--budget",
    type=click.Choice(["picture", "tile", "prompt"]),
    default="picture",
    show_default=True,
    help="--keep is of each picture, of each tile (for a model that cuts pictures), or of all of a prompt's pictures.",
)
@click.option(
    "--prompt-pictures",
    type=click.IntRange(min=1),
    metavar="N",
    help="The most pictures of a prompt: for --budget prompt, and for the decoder engine's cache.  [default: 1]",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    metavar="N",
    help="Largest area of a picture, for a model that takes any size.  [default: 1280 tokens, or its processor's]",
)
@click.option(
    "--input",
    "pixels",
    type=click.Choice(["uint8", "float32"]),
    default="uint8",
    show_default=True,
    help="Pixels the graph takes: bytes, normalised inside, or normalised floats.",
)
@click.option(
    "--share-decoder-with",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Take the decoder's files of this bundle of the same model: one copy on the disk for both (hard links).",
)
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--no-report", is_flag=True, help="Do not write report.html into the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
def command(
    model: str,
    keep: str | None,
    agreement: float | None,
    images: str | None,
    pictures: int | None,
    questions: tuple[str, ...],
    max_new_tokens: int | None,
    target: str,
    out: Path | None,
    select: str | None,
    calibration: Path | None,
    rank: int | None,
    variance: float | None,
    block: int | None,
    iterations: int | None,
    centre: bool | None,
    seed: int,
    precision: str,
    calibration_images: str | None,
    sensitive: str | None,
    decoder_precision: str,
    decoder_engine: str,
    cache: int | None,
    positions: Positions | None,
    budget: Literal["picture", "tile", "prompt"],
    prompt_pictures: int | None,
    max_pixels: int | None,
    pixels: str,
    share_decoder_with: Path | None,
    revision: str | None,
    no_report: bool,
    overwrite: bool,
) -> None:
    """Export MODEL with its vision tokens pruned inside the graph.

    MODEL is `mini-llava` (shipped with svdprune), an alias such as `llava`, a model id of the hub, or a folder.
    """
    if keep is None:
        if select != "none":
            raise UserError("how many vision tokens shall stay? Give a count (--keep 32), a share (--keep 10%) or auto")
        keep = "100%"
    found = resolve_target(target)
    check_precision(found.target, precision)
    check_precision(found.target, decoder_precision)
    if target == AUTO:
        click.echo(f"target {found.target.name}: {found.found}", err=True)
    for package in _NEEDS:
        require(package, "export", "exporting")
    speech = require("transformers.utils.logging", "export", "exporting")
    speech.set_verbosity_error()  # its notes are not about what was asked, and its bars would cross ours
    speech.disable_progress_bar()
    from svdprune.exporter.calibrate.auto import Wish
    from svdprune.exporter.export import ExportRequest, export_model

    request = ExportRequest(
        model=model,
        keep=keep,
        target=found.target.name,
        out=out,
        select=select,
        rank=rank,
        variance=variance,
        block=block,
        iterations=iterations,
        centre=centre,
        calibration=calibration,
        search=Wish(agreement, images, pictures, questions, max_new_tokens),
        seed=seed,
        precision=precision,
        calibration_images=calibration_images,
        sensitive=sensitive,
        decoder_precision=decoder_precision,
        decoder_engine=decoder_engine,
        cache=cache,
        positions=positions,
        budget=budget,
        max_pixels=max_pixels,
        prompt_pictures=prompt_pictures,
        input=pixels,
        share_decoder_with=share_decoder_with,
        revision=revision,
        report=not no_report,
        overwrite=overwrite,
    )
    with Steps() as steps:
        summary = export_model(request, steps, steps.say)
    print_summary(summary, found.target, here=target == AUTO)
