"""``svdprune estimate``: what a model should cost on a target, from its config alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import print_json
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.machine import resolve_target
from svdprune.runtime.roofline import DEFAULT, NOT_MEASURED, Efficiency
from svdprune.runtime.targets import AUTO, PRECISIONS

if TYPE_CHECKING:
    from svdprune.exporter.estimate import Case, Estimate

_NEEDS = ("safetensors", "huggingface_hub", "onnx_ir", "torch", "transformers")
_CHOICES = "|".join(PRECISIONS)
_PICTURE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@click.command("estimate", cls=Command, short_help="What a model should cost on a target, from its config alone.")
@click.argument("model")
@click.option("--keep", required=True, metavar="N|P%", help="Vision tokens to keep: a count (32) or a share (10%).")
@click.option("--target", default=AUTO, show_default=True, help="Where it will run; `svdprune targets` lists them.")
@click.option("--precision", default="fp16", show_default=True, metavar=_CHOICES, help="Of the vision part.")
@click.option("--decoder-precision", metavar=_CHOICES, help="Of the language model.  [default: the same]")
@click.option("--prompt-tokens", type=int, default=64, show_default=True, help="Tokens of text beside the picture.")
@click.option("--new-tokens", type=int, default=64, show_default=True, help="Tokens of the answer.")
@click.option("--batch", type=int, default=1, show_default=True, help="Requests answered at once.")
@click.option("--cache", type=int, help="Rows of KV cache for each request.  [default: as many as it fills]")
@click.option("--picture", metavar="WxH", help="Size of the picture, for a model that takes any.")
@click.option("--crops", type=int, help="Crops the picture is cut into.  [default: the most the model allows]")
@click.option("--select", default="leverage", show_default=True, metavar="NAME", help="Selector in the graph.")
@click.option("--rank", type=int, help="Singular directions in the leverage score.  [default: 16]")
@click.option("--tflops", type=float, help="Dense FP16 TFLOPS, for another power mode or a target without peaks.")
@click.option("--bandwidth", type=float, help="Memory bandwidth in GB/s, likewise.")
@click.option("--compute-efficiency", type=float, default=DEFAULT.compute, show_default=True, help="Share of the peak.")
@click.option(
    "--bandwidth-efficiency", type=float, default=DEFAULT.bandwidth, show_default=True, help="Share of the bandwidth."
)
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    keep: str,
    target: str,
    precision: str,
    decoder_precision: str | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    cache: int | None,
    picture: str | None,
    crops: int | None,
    select: str,
    rank: int | None,
    tflops: float | None,
    bandwidth: float | None,
    compute_efficiency: float,
    bandwidth_efficiency: float,
    revision: str | None,
    as_json: bool,
) -> None:
    """Estimate FLOPs, bytes, time and memory of MODEL on a target, at K vision tokens and at all of them.

    MODEL is `mini-llava` (shipped with svdprune), an alias such as `llava`, a model id of the hub, or a folder: its
    config is read, no weights. The times are a roofline model, not a measurement.
    """
    found = resolve_target(target)
    for package in _NEEDS:
        require(package, "export", "the estimate")
    from svdprune.exporter.estimate import Request, estimate
    from svdprune.exporter.selection import SelectorConfig

    result = estimate(
        model,
        keep,
        found.target.name,
        precision=precision,
        decoder_precision=decoder_precision,
        request=Request(prompt_tokens, new_tokens, batch, cache),
        selector=SelectorConfig(select) if rank is None else SelectorConfig(select, rank=rank),
        picture=_picture(picture),
        crops=crops,
        tflops=tflops,
        bandwidth=bandwidth,
        efficiency=Efficiency(compute_efficiency, bandwidth_efficiency),
        revision=revision,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo("\n".join(report(result)))


def _picture(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _PICTURE.fullmatch(text)
    if match is None:
        raise UserError(f"--picture is WIDTHxHEIGHT in pixels, such as 640x480, not {text!r}")
    return int(match[1]), int(match[2])


def report(result: Estimate) -> list[str]:
    """The estimate as lines of at most 80 columns (a longer name of a model has a line of its own)."""
    pruned, unpruned, asked, share = result.pruned, result.unpruned, result.request, result.efficiency
    return [
        result.model.name,
        f"on {result.machine.name}, {result.device}",
        f"vision {result.precision}, decoder {result.decoder_precision}; {asked.prompt_tokens} text tokens, "
        f"{asked.new_tokens} new tokens, batch {asked.batch}",
        f"{NOT_MEASURED}: {share.compute:.0%} of the peak, {share.bandwidth:.0%} of the bandwidth",
        *(f"note: {note}" for note in result.notes),
        "",
        f"{'':12}{f'{pruned.tokens} vision tokens':>25}{f'all {unpruned.tokens}':>25}{'':8}{'bound at':>10}",
        f"{'stage':12}{'GFLOP':>8}{'MB':>8}{'ms':>9}{'GFLOP':>8}{'MB':>8}{'ms':>9}{'all/K':>9}{f'{pruned.tokens}':>9}",
        *(_stage_line(name, pruned, unpruned) for name, _ in pruned.stages),
        _time_line("first token", pruned.first_token, unpruned.first_token),
        _time_line("answer", pruned.answer, unpruned.answer),
        "",
        *_memory_lines(result),
    ]


def _stage_line(name: str, pruned: Case, unpruned: Case) -> str:
    a, b = pruned.stage(name), unpruned.stage(name)
    sizes = "".join(f"{_short(x.flops / 1e9):>8}{_short(x.bytes / 1e6):>8}{_short(x.seconds * 1e3):>9}" for x in (a, b))
    return f"{name:12}{sizes}{_ratio(a.seconds, b.seconds):>9}{a.bound:>9}"


def _time_line(name: str, pruned: float, unpruned: float) -> str:
    return f"{name:12}{_short(pruned * 1e3):>25}{_short(unpruned * 1e3):>25}{_ratio(pruned, unpruned):>9}"


def _memory_lines(result: Estimate) -> list[str]:
    a, b = result.pruned.memory, result.unpruned.memory
    rows = [
        ("vision engine, with its activations", a.vision_engine, b.vision_engine),
        ("decoder engine, with its activations", a.decoder_engine, b.decoder_engine),
        ("embedding table", a.embedding, b.embedding),
        (f"KV cache of {a.cache_rows} and {b.cache_rows} rows", a.cache, b.cache),
        ("total", a.total, b.total),
        ("peak of building the larger engine", a.build, b.build),
    ]
    unit, size = ("GB", 1e9) if b.total >= 1e9 else ("MB", 1e6)
    heads = f"{f'memory, {unit}':40}{result.pruned.tokens:>12}{result.unpruned.tokens:>12}{'all/K':>9}"
    lines = [heads]
    lines += [f"{name:40}{_short(x / size):>12}{_short(y / size):>12}{_ratio(x, y):>9}" for name, x, y in rows]
    if a.capacity is None or a.free is None:
        return [*lines, "whether it fits is not known: the target has no memory size"]
    system = f"{a.capacity / 1e9:.0f} GB less {a.reserve / 1e9:.1f} for the system and CUDA"
    answers = [
        f"{what} {_yes(x)}" if x == y else f"{what} {_yes(x)} at K, {_yes(y)} at all"
        for what, x, y in (("fits:", a.fits, b.fits), ("can be built there:", a.build_fits, b.build_fits))
    ]
    return [*lines, f"free: {a.free / 1e9:.1f} GB ({system})", "; ".join(answers)]


def _yes(value: bool | None) -> str:
    return "yes" if value else "NO"


def _ratio(pruned: float, unpruned: float) -> str:
    """How many times more all tokens cost."""
    return f"{unpruned / pruned:.2f}x" if pruned and unpruned else "-"


def _short(value: float) -> str:
    """At most seven characters: 0.004, 12.3, 8397."""
    if value == 0:
        return "0"
    if value < 0.001:
        return f"{value:.0e}"
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
