"""The claim of docs/estimate.md: within a factor of two of published times, with one set of efficiencies."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tools import estimate_check
from tools.estimate_check import FACTOR, PUBLISHED, case_of, figures, geometric_mean, main

PAGE = Path(__file__).parents[2] / "docs" / "estimate.md"
QUOTED = [figure for row in PUBLISHED["rows"] for figure in figures(row) if figure.quoted]


def test_there_are_eight_quoted_figures() -> None:
    """ViT and prefill of four boards, as the facts quote them."""
    assert {(figure.board, figure.stage, figure.published) for figure in QUOTED} == {
        ("jetson-orin", "ViT", 57), ("jetson-orin", "prefill", 225),
        ("jetson-orin-nx", "ViT", 120), ("jetson-orin-nx", "prefill", 462),
        ("jetson-orin-nano", "ViT", 151), ("jetson-orin-nano", "prefill", 191),
        ("jetson-thor", "ViT", 16), ("jetson-thor", "prefill", 157),
    }  # fmt: skip


@pytest.mark.parametrize("figure", QUOTED, ids=lambda figure: f"{figure.board}-{figure.stage}")
def test_each_quoted_figure_is_within_a_factor_of_two(figure: estimate_check.Figure) -> None:
    assert 1 / FACTOR <= figure.ratio <= FACTOR, f"{figure.modelled:.1f} ms for {figure.published:.1f} ms"


def test_neither_too_fast_nor_too_slow_on_the_whole() -> None:
    assert 0.8 < geometric_mean([figure.ratio for figure in QUOTED]) < 1.25


def test_the_checked_models_have_as_many_parameters_as_their_publishers_count() -> None:
    """Qwen3-VL-8B's checkpoint: 576.4 M in the vision part, 8.191 B in the language model."""
    from svdprune.exporter.estimate import read_model

    model = read_model("8B", PUBLISHED["models"]["Qwen3-VL-8B"], picture=tuple(PUBLISHED["picture"]))  # type: ignore[arg-type]
    assert model.vision_parameters / 1e6 == pytest.approx(576.4, abs=0.05)
    assert model.text.parameters / 1e9 == pytest.approx(8.191, abs=0.0005)
    assert model.tokens == PUBLISHED["vision_tokens"]


def test_a_prefill_that_long_is_bound_by_arithmetic_and_a_step_by_memory() -> None:
    for row in PUBLISHED["rows"]:
        case = case_of(row)
        assert case.stage("prefill").bound == "compute", row
        assert case.stage("decode step").bound == "memory", row


def test_the_page_shows_what_the_tool_prints(tmp_path: Path) -> None:
    """A change of a target's figures or of the model wants the page written anew: `python -m tools.estimate_check`."""
    copy = tmp_path / PAGE.name
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    done = CliRunner().invoke(main, ["--write", str(copy)], catch_exceptions=False)
    assert done.exit_code == 0
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_a_figure_that_is_not_within_the_factor_fails_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_check, "FACTOR", 1.05)
    done = CliRunner().invoke(main, [])
    assert "are not within a factor of 1.05" in str(done.exception)
