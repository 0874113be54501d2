"""The README's table of models, from the rows of ``runtime.models``.

python -m tools.models_table                 print it
python -m tools.models_table --write FILE    put it into the page
"""

from __future__ import annotations

from pathlib import Path

import click

from svdprune.runtime.models import FAMILIES, ModelFamily
from tools.tables import write_between

NAME = "models"
COLUMNS = ("model", "name", "parts", "checked on", "parity with transformers", "compile gate", "GPU")


def table() -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, FAMILIES)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(family: ModelFamily) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in family.names)
    weights = {"trained": "trained weights", "random": "random weights"}[family.weights]
    parity = " and ".join(family.parity) + (f" ({family.differs})" if family.differs else "")
    return family.title, names, family.parts, weights, parity, family.gate, family.gpu or "not run"


@click.command()
@click.option("--write", "page", type=click.Path(path_type=Path, exists=True), help="Fill this page's table.")
def main(page: Path | None) -> None:
    """Print or write the README's table of models."""
    if page is None:
        click.echo(table())
    else:
        write_between(page, NAME, table())


if __name__ == "__main__":
    main()
