"""The vision graph without its selection: the same features, of every token."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper

from svdprune.runtime.errors import BundleError, SvdpruneError, UserError
from svdprune.runtime.unpruned import unpruned_graph


def run(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": pixels}), strict=True))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, tiny.SIDE, tiny.SIDE, 3), np.uint8)


def edited(source, path, change):
    """A copy of a graph after `change(model)`."""
    model = onnx.load(source)
    change(model)
    onnx.save(model, path)
    return path


def test_it_has_the_features_of_every_token(bundle, tmp_path, pixels):
    out = unpruned_graph(bundle / "vision.onnx", tmp_path / "all.onnx")
    onnx.checker.check_model(str(out), full_check=True)
    pruned, whole = run(bundle / "vision.onnx", pixels), run(out, pixels)
    assert list(whole) == ["features"] and whole["features"].shape == (2, tiny.TOKENS, tiny.HIDDEN)
    rows = np.take_along_axis(whole["features"], pruned["kept_indices"][..., None], axis=1)
    np.testing.assert_array_equal(rows, pruned["features"])


def test_nothing_of_the_selection_is_left(bundle, tmp_path):
    model = onnx.load(unpruned_graph(bundle / "vision.onnx", tmp_path / "all.onnx"))
    assert {"TopK", "GatherElements", "Div"}.isdisjoint(node.op_type for node in model.graph.node)
    assert "keep" not in {tensor.name for tensor in model.graph.initializer}
    assert [path.name for path in tmp_path.iterdir()] == ["all.onnx"]


@pytest.fixture
def external(bundle, tmp_path):
    """The tiny graph with its weights in a file of their own."""
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.load(bundle / "vision.onnx")
    onnx.save(
        model, folder / "vision.onnx", save_as_external_data=True, location="vision.onnx.data", size_threshold=256
    )
    return folder


def test_external_data_are_shared(external, tmp_path, pixels):
    beside = unpruned_graph(external / "vision.onnx", external / "all.onnx")
    assert sorted(path.name for path in external.iterdir()) == ["all.onnx", "vision.onnx", "vision.onnx.data"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked = unpruned_graph(external / "vision.onnx", elsewhere / "all.onnx")
    assert (elsewhere / "vision.onnx.data").samefile(external / "vision.onnx.data")
    np.testing.assert_array_equal(run(beside, pixels)["features"], run(linked, pixels)["features"])


def test_external_data_are_copied_where_links_are_not_possible(external, tmp_path, pixels, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = unpruned_graph(external / "vision.onnx", elsewhere / "all.onnx")
    assert not (elsewhere / "vision.onnx.data").samefile(external / "vision.onnx.data")
    assert run(out, pixels)["features"].shape[1] == tiny.TOKENS


def test_a_graph_that_keeps_everything_already(bundle, tmp_path, pixels):
    """As `--select none` exports it: no gather at all."""

    def whole(model):
        node = next(node for node in model.graph.node if node.output[0] == "clean")
        node.input[0] = "tokens"
        value = next(value for value in model.graph.output if value.name == "features")
        value.type.tensor_type.shape.dim[1].dim_value = tiny.TOKENS

    source = edited(bundle / "vision.onnx", tmp_path / "none.onnx", whole)
    out = unpruned_graph(source, tmp_path / "all.onnx")
    np.testing.assert_array_equal(run(out, pixels)["features"], run(source, pixels)["features"])


def test_a_projector_made_for_k_rows_is_refused(bundle, tmp_path):
    def fixed(model):
        node = next(node for node in model.graph.node if node.output[0] == "clean")
        node.input[0] = "fixed"
        reshape = helper.make_node("Reshape", ["chosen", "only_k"], ["fixed"])
        model.graph.node.insert(list(model.graph.node).index(node), reshape)
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, tiny.KEEP, 3]), "only_k"))

    source = edited(bundle / "vision.onnx", tmp_path / "fixed.onnx", fixed)
    with pytest.raises(BundleError, match=f"does not take all {tiny.TOKENS} tokens"):
        unpruned_graph(source, tmp_path / "all.onnx")
    assert not (tmp_path / "all.onnx").exists()


def test_indices_that_are_used_otherwise_are_refused(bundle, tmp_path):
    def other(model):
        node = next(node for node in model.graph.node if node.output[0] == "features")
        node.input[1] = "as_float"
        add = [
            helper.make_node("Cast", ["kept_indices"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["cast", "last"], ["as_float"]),
        ]
        for extra in add:
            model.graph.node.insert(len(model.graph.node) - 1, extra)

    source = edited(bundle / "vision.onnx", tmp_path / "other.onnx", other)
    with pytest.raises(BundleError, match="cannot be taken out"):
        unpruned_graph(source, tmp_path / "all.onnx")


def test_what_cannot_be_read_or_written_is_said(bundle, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot be read"):
        unpruned_graph(broken, tmp_path / "all.onnx")
    with pytest.raises(BundleError, match="cannot be read"):
        unpruned_graph(tmp_path / "absent.onnx", tmp_path / "all.onnx")
    with pytest.raises(BundleError, match="lacks the output"):
        unpruned_graph(bundle / "decoder/model.onnx", tmp_path / "all.onnx")
    with pytest.raises(UserError, match="the pruned graph itself"):
        unpruned_graph(bundle / "vision.onnx", bundle / "vision.onnx")
    with pytest.raises(SvdpruneError, match="cannot be written"):
        unpruned_graph(bundle / "vision.onnx", tmp_path / "no folder" / "all.onnx")
