"""``svdprune models``: the model families that can be exported, and what of each was checked."""

from __future__ import annotations

import textwrap

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import print_json, print_table
from svdprune.runtime.errors import UserError
from svdprune.runtime.models import FAMILIES, ModelFamily

WIDTH = 80
_WEIGHTS = {"trained": "a trained checkpoint", "random": "small checkpoints with random weights"}


@click.command("models", cls=Command, short_help="Which models can be exported, and what was checked.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the model families, or everything about one: NAME is a family, a model_type or a short name."""
    if name is not None:
        found = _named(name)
        if as_json:
            print_json(found.to_dict())
        else:
            _print_one(found)
        return
    if as_json:
        print_json([family.to_dict() for family in FAMILIES])
        return
    print_table(("family", "names", "checked on", "parity", "GPU"), [_line(family) for family in FAMILIES], tight=True)
    click.echo("\nParity: releases of transformers with the same greedy tokens. GPU: -: not run.")
    click.echo("TensorRT-RTX builds all of them, on a CPU. More about one: svdprune models NAME.")
    click.echo("A hub id or a folder of these families can be given in place of a name.")


def _named(name: str) -> ModelFamily:
    for family in FAMILIES:
        if name in (family.family, *family.model_types, *family.names):
            return family
    known = ", ".join(family.family for family in FAMILIES)
    raise UserError(f"there is no model family {name!r}: known are {known}")


def _line(family: ModelFamily) -> tuple[str, ...]:
    releases = ", ".join(family.parity) or "-"
    return (
        family.family,
        "\n".join(textwrap.wrap(" ".join(family.names), 24)),
        family.weights,
        releases,
        family.gpu or "-",
    )


def _print_one(family: ModelFamily) -> None:
    rows = [
        ("family", family.family),
        ("title", family.title.replace("`", "")),
        ("model_type", ", ".join(family.model_types)),
        ("names", ", ".join(family.names)),
        ("parts", family.parts),
        ("exported", f"from {_WEIGHTS[family.weights]}"),
        ("parity", f"transformers {', '.join(family.parity)}: the same greedy tokens"),
        *([("differs", family.differs)] if family.differs else []),
        ("compile gate", f"{family.gate}: built by TensorRT-RTX on a CPU"),
        ("GPU", family.gpu or "not run"),
    ]
    for name, value in rows:
        click.echo(textwrap.fill(f"{name:<14}{value}", WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False))
