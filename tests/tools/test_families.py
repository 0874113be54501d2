"""The tool that compares families with transformers: its layouts, and what it calls the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.families.__main__ import COLUMNS, Row, known, table
from tools.families.older import older_layout
from tools.families.reference import flat


def test_a_folder_of_today_becomes_one_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    local, whole = (
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    )
    config = {
        "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"rope_parameters": {"sliding_attention": local, "full_attention": whole}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"merge_size": 2, "size": {"shortest_edge": 4, "longest_edge": 9}})
    )
    save_file({"vision_tower.layer": torch.ones(2), "language_model.head": torch.ones(3)}, folder / "model.safetensors")
    older = older_layout(folder, tmp_path / "old")
    assert set(load_file(older / "model.safetensors")) == {"vision_tower.vision_model.layer", "language_model.head"}
    assert json.loads((older / "config.json").read_text())["text_config"] == {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }
    image = json.loads((older / "preprocessor_config.json").read_text())
    assert (image["min_pixels"], image["max_pixels"]) == (4, 9)


def test_rows_come_in_any_form() -> None:
    tiles = torch.arange(24.0).reshape(2, 3, 4)
    for given in (tiles, [tiles[0], tiles[1]], (tiles[:1], tiles[1:])):
        assert torch.equal(flat(given), tiles.reshape(6, 4))


def test_a_difference_is_told_and_its_reason_where_it_is_known() -> None:
    same, other = Row("4.57.1"), Row("4.57.1")
    for row in (same, other):
        for key in COLUMNS:
            row.columns[key].count, row.columns[key].same = 6, 6
    other.columns[COLUMNS[0]].same = 4
    other.columns[COLUMNS[0]].tie = 1
    assert same.whole and not other.whole
    text = table({"llava_next": same, "llava_onevision": other})
    assert "| `llava_onevision` | Qwen2 | 4 of 6, 1 ties | 6 of 6 |" in text
    assert text.count(str(known("llava_onevision", other))) == 1
    assert known("llava_next", same) is None and known("llava_onevision", Row("5.23.0")) is None
