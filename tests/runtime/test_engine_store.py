"""Engines inside a bundle: found by what they are tied to, refused with the reason, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_engines
from fake_trt import install, make_trt

from svdprune.runtime.bundle import open_bundle, write_bundle
from svdprune.runtime.engines import store
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.key import BuildOptions, EngineKey, graph_bytes, graph_digest, graph_files
from svdprune.runtime.engines.store import (
    drop_engine,
    find_engine,
    list_engines,
    note_engine,
    prepare_store,
    put_engine,
)
from svdprune.runtime.errors import UserError


@pytest.fixture
def here(bundle, tmp_path):
    """A copy of the tiny bundle, opened."""
    shutil.copytree(bundle, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.fixture
def orin(monkeypatch):
    return find_tensorrt(install(monkeypatch, make_trt("tensorrt-10.3", 87)).__name__)


def put(opened, data=b"engine", part="vision", built="2026-01-01", **changes):
    fields = {"runtime": "tensorrt", "version": "10.3.0", "sm": 87, "graph": graph_digest(opened, part), "options": {}}
    return put_engine(opened, part, EngineKey(**(fields | changes)), data, {"built": built, "selftest": "passed"})


def test_what_is_put_is_found(here, orin):
    made = put(here)
    assert made.path.read_bytes() == b"engine" and made.path.parent.name == made.key.folder
    assert made.key.folder.startswith("tensorrt-10.3.0-sm87-") and list_engines(here) == [made]
    assert find_engine(here, "vision", orin, 87) == made == find_engine(here, "vision", orin, None)
    assert json.loads((made.path.parent / "build.json").read_text())["bytes"] == 6
    open_bundle(here.path)  # engines are no part of the manifest


def test_of_several_the_latest_is_taken_and_any_sm_fits(here, monkeypatch):
    put(here, built="2026-01-02", options={"level": 5})
    newest = put(here, built="2026-01-03", options={"level": 4})
    put(here, built="2026-01-01")
    trt = find_tensorrt(install(monkeypatch, make_trt("tensorrt-10.3", 87)).__name__)
    assert find_engine(here, "vision", trt, 87) == newest
    portable = put(here, sm=None, built="2026-02-01", version="1.7.1.116", runtime="tensorrt_rtx")
    rtx = find_tensorrt(install(monkeypatch, make_trt("tensorrt_rtx-1.7", 120)).__name__)
    assert find_engine(here, "vision", rtx, 120) == portable and "-any-" in portable.key.folder


def test_none_was_built(here, orin):
    with pytest.raises(UserError, match=r"no vision engine for TensorRT: run `svdprune build .* --runtime tensorrt`"):
        find_engine(here, "vision", orin, 87)
    put(here, runtime="tensorrt_rtx", version="1.7.1.116", sm=89)
    with pytest.raises(UserError, match=r"has no vision engine for TensorRT \(it has one for TensorRT-RTX\)"):
        find_engine(here, "vision", orin, 87)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graph": "0" * 64}, "of another graph than this bundle's"),
        ({"version": "10.16.1"}, r"of TensorRT 10.16.1 \(this is 10.3.0\)"),
        ({"sm": 89}, r"of a GPU of sm 89 \(this is sm 87\)"),
        ({"sm": 89, "graph": "0" * 64}, "of another graph than this bundle's and a GPU of sm 89"),
    ],
)
def test_a_stale_engine_says_why(here, orin, change, words):
    put(here, **change)
    with pytest.raises(UserError, match=f"the vision engine in .* is stale, it is {words}.*: run `svdprune build"):
        find_engine(here, "vision", orin, 87)


def test_a_version_compatible_engine_runs_later_and_not_earlier(here, monkeypatch):
    made = put(here, options={"version_compatible": True})
    later = find_tensorrt(install(monkeypatch, make_trt("tensorrt-10.16", 87)).__name__)
    assert find_engine(here, "vision", later, 87) == made
    for api, version in (("tensorrt-11.4", "11.4.0"), ("tensorrt-10.3", "10.2.0")):
        other = find_tensorrt(install(monkeypatch, make_trt(api, 87, version)).__name__)
        with pytest.raises(UserError, match="stale"):
            find_engine(here, "vision", other, 87)


def test_a_truncated_or_changed_engine_is_refused(here, orin):
    made = put(here)
    made.path.write_bytes(b"engina")
    with pytest.raises(UserError, match="was changed since it was built"):
        find_engine(here, "vision", orin, 87)
    assert find_engine(here, "vision", orin, 87, verify=False) == made
    made.path.write_bytes(b"eng")
    with pytest.raises(UserError, match="is truncated: it has 3 of 6 bytes: run `svdprune build` again"):
        find_engine(here, "vision", orin, 87, verify=False)
    made.path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        find_engine(here, "vision", orin, 87)


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"part": "vision"}', '{"schema": 1, "part": "vision", "key": 3}'])
def test_a_damaged_note_is_no_engine(here, note):
    made = put(here)
    (made.path.parent / "build.json").write_text(note)
    assert list_engines(here) == []


def test_an_engine_moved_to_another_folder_is_no_engine(here):
    made = put(here)
    os.rename(made.path.parent, made.path.parent.with_name("elsewhere"))
    assert list_engines(here) == []


def test_an_engine_is_replaced_noted_and_dropped(here, orin):
    put(here)
    made = note_engine(put(here, b"better"), selftest="not run")
    assert made.path.read_bytes() == b"better" and find_engine(here, "vision", orin, 87).selftest == "not run"
    drop_engine(made)
    assert list_engines(here) == [] and not made.path.parent.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(here, monkeypatch, error):
    before = put(here)

    def fail(*_):
        raise error

    monkeypatch.setattr(store, "_write_json", fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as caught:
        put(here, b"half")
    assert isinstance(error, KeyboardInterrupt) or "cannot be kept in" in str(caught.value)
    assert [place.name for place in (here.path / "engines").iterdir()] == [before.path.parent.name]
    assert before.path.read_bytes() == b"engine"


def test_a_read_only_bundle_and_a_full_disk_are_seen_early(here, monkeypatch):
    left = here.path / "engines" / f".x.partial-{2**22 + 7}"  # of a process number that Linux does not give out
    left.mkdir(parents=True)
    assert prepare_store(here, 10).is_dir() and not left.exists()
    with pytest.raises(UserError, match=r"GB free and the engine needs about 1000000000.00 GB: make room"):
        prepare_store(here, 10**18)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\).*copy it to another place"):
        prepare_store(here, 10)


def test_the_key_is_of_the_graph_with_its_data_and_the_options(tmp_path):
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    opened = open_bundle(path)
    with write_bundle(tmp_path / "other") as writer:
        for name in opened.manifest.files:
            shutil.copy(path / name, writer.file(name))
        writer.file("decoder/engine.onnx.data").write_bytes(b"weights")
        writer.manifest = opened.manifest
    other = open_bundle(tmp_path / "other")
    assert graph_files(other, "decoder") == ["decoder/engine.onnx", "decoder/engine.onnx.data"]
    assert graph_bytes(other, "decoder") == graph_bytes(opened, "decoder") + 7
    assert graph_digest(other, "vision") == graph_digest(opened, "vision")
    assert graph_digest(other, "decoder") != graph_digest(opened, "decoder")
    keys = {
        EngineKey("tensorrt", "10.3.0", 87, graph, BuildOptions(**options).of_part(part)).folder
        for graph in "ab"
        for part in ("vision", "decoder")
        for options in ({}, {"batch": (1, 2, 4)}, {"level": 1}, {"workspace": 1 << 30}, {"version_compatible": True})
    }
    assert len(keys) == 2 * (5 + 4)  # the batch is no option of the decoder


def test_no_decoder_graph(here, tmp_path):
    with pytest.raises(UserError, match="without one"):
        graph_files(here, "decoder")
    made = tiny.make_bundle(tmp_path / "refused", decoder={"engine_refused": "TensorRT 10.3 lacks Attention"})
    with pytest.raises(UserError, match=r"lacks Attention.*--part vision"):
        graph_files(open_bundle(made), "decoder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": (1, 4, 2)}, "three rising numbers"),
        ({"batch": (0, 1, 2)}, "three rising numbers"),
        ({"batch": (2, 2, 2)}, "must start at 1"),
        ({"level": 6}, "between 0 and 5"),
        ({"workspace": 0}, "more than 0 GiB"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        BuildOptions(**options)
