"""``svdprune profile``: what each stage of an answer costs on this machine, pruned and unpruned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.options import backend_options
from svdprune.runtime.cli.show import Steps, print_json


@click.command("profile", cls=Command, short_help="Time every stage, pruned against unpruned.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", metavar="PATH", help="The picture.  [default: the bundle's golden one]")
@click.option("--prompt", metavar="TEXT", help="The question.  [default: the golden one]")
@click.option("--runs", type=int, default=20, show_default=True, help="Runs that count.")
@click.option("--warm-up", type=int, default=3, show_default=True, help="Runs before those.")
@click.option("--new-tokens", type=int, default=16, show_default=True, help="Tokens that each run decodes.")
@click.option("--no-unpruned", is_flag=True, help="Do not run the graph without its selection.")
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Slowest layers to list; 0 measures none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every layer.")
@click.option("--chart", type=click.Path(path_type=Path), metavar="PNG", help="Draw the stages as bars here.")
@backend_options
def command(
    bundle: Path,
    image: str | None,
    prompt: str | None,
    runs: int,
    warm_up: int,
    new_tokens: int,
    no_unpruned: bool,
    layers: int,
    as_json: bool,
    chart: Path | None,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
) -> None:
    """Time the stages of an answer by BUNDLE on this machine: median, 90th and 99th percentile.

    The graph without its selection, made here from the bundle's own, runs in turn with it. Every run answers a real
    picture. Needs the extra `profile`.
    """
    from svdprune.runtime.profile.measure import Plan, profile
    from svdprune.runtime.profile.text import profile_text

    plan = Plan(runs, warm_up, new_tokens, unpruned=not no_unpruned, layers=layers > 0)
    if chart is not None:
        from svdprune.runtime.profile.chart import check_chart_path, save_chart

        check_chart_path(chart)
    with Steps() as progress:
        report = profile(bundle, vision_backend, decoder_backend, threads, checkpoint, image, prompt, plan, progress)
    if chart is not None:
        save_chart(report, chart)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        click.echo(profile_text(report, layers))
        if chart is not None:
            click.echo(f"\nchart: {chart}")
