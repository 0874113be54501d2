"""What is said of the model families is said of those there are, and the README says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from svdprune.exporter.families.base import family_of, supported_model_types
from svdprune.exporter.source import ALIASES, SHIPPED
from svdprune.runtime.cli.app import group
from svdprune.runtime.models import FAMILIES
from tools.families.cases import MODELS
from tools.models_table import NAME, main, table

ROOT = Path(__file__).resolve().parents[2]


def between(text: str) -> str:
    return text.split(f"<!-- {NAME} -->\n")[1].split(f"\n<!-- /{NAME} -->")[0]


def test_every_family_of_the_exporter_is_there_and_no_other() -> None:
    listed = [kind for family in FAMILIES for kind in family.model_types]
    assert sorted(listed) == sorted(supported_model_types())
    for family in FAMILIES:
        for kind in family.model_types:
            assert family_of({"model_type": kind}, "a test").name == family.family


def test_every_short_name_is_there_and_no_other() -> None:
    assert sorted(name for family in FAMILIES for name in family.names) == sorted([SHIPPED, *ALIASES])


def test_every_family_is_compared_with_transformers() -> None:
    """`tools.families` has a row for each, so a figure of parity can be had for each."""
    compared = {name.split(" ")[0] for name in MODELS}
    for family in FAMILIES:
        assert compared & set(family.model_types), family.family
        assert family.parity or family.differs


def test_the_readme_is_as_the_rows_are() -> None:
    hint = "run python -m tools.models_table --write README.md"
    assert between((ROOT / "README.md").read_text(encoding="utf-8")) == table(), hint


def test_the_families_page_has_a_section_for_each() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    for family in FAMILIES:
        for kind in family.model_types:
            assert any(f"`{kind}`" in heading for heading in headings), kind


def test_the_tool_writes_what_it_prints(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {NAME} -->\nold\n<!-- /{NAME} -->\n", encoding="utf-8")
    assert CliRunner().invoke(main, ["--write", str(page)], catch_exceptions=False).exit_code == 0
    assert between(page.read_text(encoding="utf-8")) == table()
    assert CliRunner().invoke(main, [], catch_exceptions=False).stdout.strip() == table()


def test_the_command_lists_them() -> None:
    run = CliRunner()
    listed = json.loads(run.invoke(group, ["models", "--json"], catch_exceptions=False).stdout)
    assert [row["family"] for row in listed] == [family.family for family in FAMILIES]
    table_text = run.invoke(group, ["models"], catch_exceptions=False).stdout
    assert all(family.family in table_text for family in FAMILIES)
    assert max(map(len, table_text.splitlines())) <= 80
    for name in ("gemma3", "smolvlm", "mini-llava"):
        one = run.invoke(group, ["models", name], catch_exceptions=False).stdout
        assert name in one and max(map(len, one.splitlines())) <= 80
        row = json.loads(run.invoke(group, ["models", name, "--json"], catch_exceptions=False).stdout)
        assert name in (*row["names"], row["family"])


@pytest.mark.parametrize("name", ["blip", "LLAVA"])
def test_an_unknown_family_is_refused_with_those_there_are(name: str) -> None:
    done = CliRunner().invoke(group, ["models", name])
    assert done.exit_code == 2
    assert f"there is no model family '{name}': known are llava, " in done.output
