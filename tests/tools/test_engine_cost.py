"""What the selection costs an engine, by real builds with TensorRT-RTX: the shipped model's, and a ViT-L/14-336's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.engine_cost import SELECTIONS, Build, build_here, measure, rows, vision_graph

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SM = 89  # rtx-40


def test_mini_llava_in_fp16_builds_for_an_rtx_40(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    build = build_here(vision_graph("mini-llava", "leverage", "fp16", tmp_path / "graph"), SM)
    assert build.engine > 1e6 and build.layers > 100 and build.added > 0


@pytest.mark.slow
def test_a_vit_l_builds_and_the_selection_adds_little(tmp_path: Path) -> None:
    """24 layers of width 1024 with random weights; the engine of all tokens is the measure."""
    builds = {}
    for select in SELECTIONS:
        (tmp_path / select).mkdir()
        builds[select] = measure(vision_graph("vit-l", select, "fp16", tmp_path / select), SM)
    pruned, plain = (builds[select] for select in SELECTIONS)
    assert plain.engine > 500e6
    assert pruned.engine <= 1.1 * plain.engine
    assert pruned.layers > plain.layers


def test_the_table_says_what_the_selection_adds() -> None:
    plain, pruned = Build(10**8, 2 * 10**8, 5.0, 4.0, 100, 10**9), Build(10**8, 21 * 10**7, 9.0, 6.5, 300, 10**9)
    slow = Build(10**8, 21 * 10**7, 20.0, 7.0, 300, 10**9)
    lines = rows("vit-l", "fp16", {"leverage": [slow, pruned], "none": [plain]})
    assert len(lines) == 3
    assert lines[0] == "| vit-l fp16 | leverage | 100.0 | 210.0 | 300 | 9.0 | 6.5 | 1.00 |"
    assert "+10.0 (**+5.0%**) | +200 | **+4.0** | **+2.5**" in lines[2]
