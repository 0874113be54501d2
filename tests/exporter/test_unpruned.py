"""The unpruned graph derived from a bundle's is the one that `--select none` exports; parts are told by node names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from svdprune.exporter import vision
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.unpruned import unpruned_graph

KEEP = 4


def export(checkpoint: Path, folder: Path, name: str, keep: int, precision: str) -> Path:
    opened = Checkpoint(checkpoint)
    family = family_of(opened.config, "tiny")
    spec = family.describe(opened)
    folder.mkdir()
    model = vision.build_vision(
        opened, family, spec, SelectorConfig(name=name, rank=4), keep or spec.tokens, precision=precision
    )
    vision.save_graph(model, folder / "vision.onnx")
    return folder / "vision.onnx"


def features(path: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 42, 42, 3), dtype=np.uint8)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["features"], {"pixels": pixels})[0]


@pytest.mark.parametrize(("name", "precision"), [("leverage", "fp32"), ("norm", "fp16")])
def test_it_equals_an_export_that_keeps_everything(
    tiny_llava: Path, tmp_path: Path, name: str, precision: str
) -> None:
    pruned = export(tiny_llava, tmp_path / "pruned", name, KEEP, precision)
    check_names(onnx.load(pruned))
    whole = export(tiny_llava, tmp_path / "whole", "none", 0, precision)
    derived = onnx.load(unpruned_graph(pruned, tmp_path / "derived.onnx"))
    bare = onnx.load(unpruned_graph(whole, tmp_path / "bare.onnx"))  # nothing to take out but the scores
    assert [node.name for node in derived.graph.node] == [node.name for node in bare.graph.node]
    np.testing.assert_array_equal(features(tmp_path / "derived.onnx"), features(tmp_path / "bare.onnx"))
    if precision == "fp32":
        np.testing.assert_array_equal(features(tmp_path / "derived.onnx"), features(whole))
    else:  # on a CPU, ONNX Runtime rounds to float16 in other places when the scorer reads the tokens, too
        np.testing.assert_allclose(features(tmp_path / "derived.onnx"), features(whole), atol=4e-3)


def test_large_weights_stay_where_they_are(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "EXTERNAL_ABOVE", 0)
    pruned = export(tiny_llava, tmp_path / "pruned", "leverage", KEEP, "fp32")
    beside = unpruned_graph(pruned, pruned.parent / "all.onnx")
    (tmp_path / "apart").mkdir()
    apart = unpruned_graph(pruned, tmp_path / "apart" / "all.onnx")
    assert (tmp_path / "apart" / "vision.onnx.data").samefile(pruned.parent / "vision.onnx.data")
    np.testing.assert_array_equal(features(apart), features(beside))


def check_names(model: onnx.ModelProto) -> None:
    """Parts are told by the names of nodes, and no two nodes share one."""
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    operators = {node.name: node.op_type for node in model.graph.node if node.name.startswith("select/")}
    assert operators == {
        "select/top": "TopK",
        "select/place": "Cast",
        "select/order": "TopK",
        "select/kept": "Cast",
        "select/column": "Unsqueeze",
        "select/gather": "GatherND",
    }
    first = min(i for i, name in enumerate(names) if name.startswith("scorer/"))
    assert all(name.startswith(("scorer/", "select/", "projector/")) for name in names[first:])
