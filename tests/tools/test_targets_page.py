"""docs/targets.md says what the rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from svdprune.runtime.targets import RELEASES, TARGETS
from svdprune.runtime.traps import TRAPS
from tools.targets_page import SECTIONS, main, sections

PAGE = Path(__file__).resolve().parents[2] / "docs" / "targets.md"


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_is_as_the_rows_are(name: str) -> None:
    hint = "run python -m tools.targets_page --write docs/targets.md"
    assert between(PAGE.read_text(encoding="utf-8"), name) == sections()[name], hint


def test_every_row_is_on_the_page() -> None:
    tables = sections()
    assert set(tables) == set(SECTIONS)
    for name in TARGETS:
        assert f"| `{name}` |" in tables["targets"]
        assert f"| `{name}` |" in tables["precisions"]
    assert [line.split(" | ")[0].strip("| ") for line in tables["releases"].splitlines()[2:]] == [
        release.name for release in RELEASES
    ]
    assert re.findall(r"^\| `([\w-]+)` \|", tables["rules"], re.M) == [trap.name for trap in TRAPS]


def test_a_rule_says_for_which_releases_it_holds() -> None:
    spans = {line.split(" | ")[0].strip("| `"): line.split(" | ")[3] for line in sections()["rules"].splitlines()}
    assert spans["factorisation"] == "all"
    assert spans["decoder-operators"] == "up to 10.14 (10.3, 10.13)"
    assert spans["tensorscatter-form"] == "from 10.15 (10.16, 11.4)"
    assert spans["dft-rtx"] == "TensorRT-RTX"


def test_the_tool_writes_what_it_prints(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in SECTIONS), encoding="utf-8")
    assert CliRunner().invoke(main, ["--write", str(page)], catch_exceptions=False).exit_code == 0
    printed = CliRunner().invoke(main, [], catch_exceptions=False).stdout
    for name in SECTIONS:
        assert between(page.read_text(encoding="utf-8"), name) in printed
