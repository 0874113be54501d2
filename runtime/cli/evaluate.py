"""``svdprune evaluate``: what pruning costs in answers, on labelled pictures or on one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.options import backend_options
from svdprune.runtime.cli.show import Steps, print_json, print_table
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require

if TYPE_CHECKING:
    from svdprune.calib.evaluate.report import Report
    from svdprune.calib.sources import Source
    from svdprune.runtime.manifest import Positions

_NEEDS = ("safetensors", "huggingface_hub", "onnx", "onnx_ir", "torch", "transformers")
_KEEPS, _POLICIES = "128,64,32,16", "compact,original"


@click.command("evaluate", cls=Command, short_help="What pruning costs in answers: selectors side by side.")
@click.argument("model", metavar="MODEL|BUNDLE")
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="SPEC",
    help="A folder of pictures (questions.jsonl in it or not), scenes, easy-vqa, hf:ID|FOLDER[:SPLIT], or gqa:, "
    "textvqa:, textvqa+ocr:, pope:, vqav2: and the folder of the published files.",
)
@click.option("--pictures", type=click.IntRange(min=1), default=100, show_default=True, help="The most pictures.")
@click.option("--at-least", type=click.IntRange(min=1), default=1, show_default=True, help="Usable pictures wanted.")
@click.option("--keep", metavar="LIST", help=f"Tokens kept: counts or shares.  [default: {_KEEPS}]")
@click.option(
    "--selectors",
    metavar="LIST",
    help="Names, with settings as in leverage:rank=8:centre:tap=-1, or `variants`.  [default: all, once each]",
)
@click.option(
    "--budget",
    type=click.Choice(["picture", "tile"]),
    help="K is of the whole picture or of each tile, for a MODEL that cuts pictures into tiles.  [default: picture]",
)
@click.option("--positions", metavar="LIST", help=f"Position policies.  [default: {_POLICIES}; a bundle's own]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sample and of `random`.")
@click.option(
    "--question",
    "questions",
    multiple=True,
    metavar="TEXT",
    help="Asked about pictures without questions; may be given again.  [default: three general ones]",
)
@click.option("--no-labels", is_flag=True, help="Leave the data's answers aside: agreement alone is compared.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Longest answer.")
@click.option("--device", metavar="NAME", help="Where torch runs a MODEL: cpu, cuda.  [default: cpu]")
@click.option("--batch", type=click.IntRange(min=1), help="Questions that a MODEL answers at once.  [default: 64]")
@backend_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for evaluation.json, .csv, .md and .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    data: str,
    pictures: int,
    at_least: int,
    keep: str | None,
    selectors: str | None,
    budget: Literal["picture", "tile"] | None,
    positions: str | None,
    seed: int,
    questions: tuple[str, ...],
    no_labels: bool,
    max_new_tokens: int,
    device: str | None,
    batch: int | None,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what pruning costs in answers.

    MODEL (`mini-llava`, an alias, a hub id, a folder): every selector at every count under both position policies, on
    the same pictures. BUNDLE: what it answers as it is, and without its pruning.

    Accuracy where the data has labels; agreement with the unpruned model's greedy answers, and the divergence (KL) of
    the first token, always. A star marks a difference from `random` whose 95 % interval leaves out 0.
    """
    from svdprune.calib.sources import DEFAULT_QUESTIONS, open_source

    if out is not None:
        from svdprune.calib.evaluate.files import check_folder

        check_folder(out)
        require("matplotlib", "data", "the plot")
    bundle = (Path(model) / "manifest.json").is_file()
    given = {"--keep": keep, "--selectors": selectors, "--device": device, "--batch": batch, "--budget": budget}
    if bundle and (unused := [name for name, value in given.items() if value is not None]):
        raise UserError(f"{model} is a bundle, which keeps what was put into it: leave out {', '.join(unused)}")
    if not bundle and (vision_backend, decoder_backend, checkpoint) != ("onnxruntime", "onnxruntime", None):
        raise UserError(f"{model} is not a bundle and runs in torch: leave out the backends and --checkpoint")
    with Steps() as steps:
        source = open_source(
            data,
            limit=pictures,
            seed=seed,
            at_least=at_least,
            questions=questions or DEFAULT_QUESTIONS,
            labels=not no_labels,
        )
        if bundle:
            report = _bundle(
                model, source, positions, max_new_tokens, (vision_backend, decoder_backend), checkpoint, threads, steps
            )
        else:
            report = _model(
                model, source, keep, selectors, budget, positions, seed, max_new_tokens, device, batch, threads, steps
            )
    if source.broken:
        click.echo(f"svdprune: note: {source.describe_broken()}", err=True)
    written = []
    if out is not None:
        from svdprune.calib.evaluate.files import write_files

        written = write_files(report, out, f"{report.facts['model']}: {data}, {report.pictures} pictures")
    if as_json:
        print_json(report.to_json())
    else:
        _print(report, written)


def _model(
    model: str,
    source: Source,
    keep: str | None,
    selectors: str | None,
    budget: Literal["picture", "tile"] | None,
    positions: str | None,
    seed: int,
    limit: int,
    device: str | None,
    batch: int | None,
    threads: int | None,
    steps: Steps,
) -> Report:
    for package in _NEEDS:
        require(package, "export", "evaluating a model")
    speech = require("transformers.utils.logging", "export", "evaluating a model")
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    torch = require("torch", "export", "evaluating a model")
    if threads is not None:
        torch.set_num_threads(threads)
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"torch cannot use {device} here: leave out --device, or install torch with CUDA")
    from svdprune.exporter.evaluate.contenders import fitting, parse_contenders
    from svdprune.exporter.evaluate.model import Model
    from svdprune.exporter.evaluate.run import evaluate_model
    from svdprune.exporter.families import family_of
    from svdprune.exporter.selection import parse_keep
    from svdprune.exporter.source import locate
    from svdprune.exporter.tiles import described

    contenders = parse_contenders((selectors or "").split(","), seed)
    policies = _policies(positions or _POLICIES)
    steps(f"loading {model}", 0.0)
    found = locate(model)
    spec = described(family_of(found.checkpoint.config, model), found.checkpoint, budget or "picture")
    loaded = Model(found.checkpoint, model, device or "cpu", lambda note: steps(note, None), spec)
    if not selectors:
        contenders = fitting(contenders, spec)
    tokens = loaded.spec.tokens
    if keep is None:
        keeps = [count for count in map(int, _listed(_KEEPS)) if count < tokens]
        if not keeps:
            raise UserError(f"the model has {tokens} vision tokens, fewer than the usual counts: give --keep")
    else:
        keeps = list(dict.fromkeys(parse_keep(one, tokens) for one in _listed(keep)))
    return evaluate_model(
        loaded, found.id, source, contenders, keeps, policies, limit=limit, batch=batch or 64, progress=steps
    )


def _bundle(
    path: str,
    source: Source,
    positions: str | None,
    limit: int,
    backends: tuple[str, str],
    checkpoint: str | None,
    threads: int | None,
    steps: Steps,
) -> Report:
    from svdprune.calib.evaluate.bundle import evaluate_bundle
    from svdprune.runtime.vlm import load

    if positions is not None and "," in positions:
        raise UserError(f"--positions {positions}: a bundle is measured under one policy at a time, give one")
    steps(f"opening {path}", 0.0)
    vlm = load(path, *backends, threads=threads, positions=positions, checkpoint=checkpoint)
    return evaluate_bundle(vlm, source, limit=limit, threads=threads, progress=steps)


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _policies(text: str) -> list[Positions]:
    from svdprune.runtime.positions import policy_named

    return list(dict.fromkeys(policy_named(one) for one in _listed(text)))


def _print(report: Report, written: list[Path]) -> None:
    from svdprune.calib.evaluate.tables import table

    columns, rows = table(report)
    print_table(columns, rows, title=report.facts["model"])
    for name, value in report.facts.items():
        if name != "model":
            click.echo(f"{name:<10} {value}")
    for path in written:
        click.echo(f"{'written':<10} {path}")
