"""tools.parity: a bundle of a tiny checkpoint passes, one of other weights fails, a tie is told from a difference."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from svdprune.exporter.export import ExportRequest, export_model
from tools.parity import SCORE_TIE, TIE, Tokens, Vision, compare, failures, main, score_gap

KEEP = 4
LOGITS = np.array([[0.0, 5.0, 5.0 - TIE / 2, 4.0], [9.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("ours", "outcome"),
    [([1, 0], "same"), ([2, 3], "tie"), ([3, 0], "different"), ([1, 2], "different"), ([1], "different")],
)
def test_the_first_difference_decides(ours: list[int], outcome: str) -> None:
    assert compare(ours, [1, 0], LOGITS) == outcome


def test_kept_indices_that_differ_by_a_tie_of_scores() -> None:
    scores = np.array([0.9, 0.5, 0.5 * (1 + SCORE_TIE / 2), 0.1])
    assert score_gap(np.array([0, 2]), np.array([0, 2]), scores) == 0
    assert 0 < score_gap(np.array([0, 1]), np.array([0, 2]), scores) < SCORE_TIE
    assert score_gap(np.array([0, 3]), np.array([0, 2]), scores) > 0.7


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "fp32"
    export_model(ExportRequest(str(tiny_llava), str(KEEP), rank=4, out=folder))
    return folder


def run(checkpoint: Path, bundle: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        main, ["--checkpoint", str(checkpoint), "--bundle", str(bundle), "--questions", "14", *more]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_bundle_agrees_with_its_checkpoint(tiny_llava: Path, bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- parity-fp32 -->\nold\n<!-- /parity-fp32 -->\nafter\n")
    code, output = run(tiny_llava, bundle, "--write", str(page))
    assert code == 0, output
    text = page.read_text()
    assert "| pictures with the same kept indices | 14 of 14 |" in text
    assert "| compact | 14 of 14 |" in text
    assert "| original | 14 of 14 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


@pytest.mark.parametrize(
    ("vision", "decoder", "count"), [("fp32", "fp32", 3), ("fp32", "int4", 2), ("fp16", "fp32", 0), ("fp16", "int4", 0)]
)
def test_only_float32_parts_are_judged(vision: str, decoder: str, count: int) -> None:
    manifest = SimpleNamespace(vision=SimpleNamespace(precision=vision), decoder=SimpleNamespace(precision=decoder))
    seen = Vision(cosine=[1.0, 0.9], difference=[0.0, 0.1], overlap=[1.0, 0.75], gap=[0.0, 0.01])
    tallies = {"compact": Tokens(same=2), "original": Tokens(same=1, different=["what? bundle 'a', transformers 'b'"])}
    assert len(failures(SimpleNamespace(manifest=manifest), seen, tallies)) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(("part", "message"), [("lm_head", "compact: "), ("multi_modal_projector", "the cosine")])
def test_other_weights_are_no_parity(part: str, message: str, tiny_llava: Path, bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llava, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if part in name and name.endswith("weight"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, output = run(other, bundle)
    assert code == 1
    assert f"no parity: {message}" in output
