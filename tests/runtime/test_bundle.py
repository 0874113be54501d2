"""Bundles: written whole or not at all, and refused with the name of what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from svdprune.runtime import BundleError, Manifest, UserError, load, open_bundle, write_bundle
from svdprune.runtime.bundle_reader import check_name


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_round_trip(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert Manifest.from_json(opened.manifest.to_json()) == opened.manifest
    assert set(opened.manifest.files) == {
        p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()
    } - {"manifest.json"}
    assert opened.file("vision.onnx").is_file()
    with pytest.raises(BundleError, match=r"no file vision.txt"):
        opened.file("vision.txt")


def test_a_bundle_of_schema_2_reads_as_it_was(copy: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["schema"] = 2
        for section, names in (
            ("decoder", ("position_axes", "deepstack", "mask")),
            ("processor", ("placeholder", "picture")),
            ("vision", ("deepstack",)),
        ):
            for name in names:
                del content[section][name]

    edit(copy, older)
    manifest = open_bundle(copy).manifest
    assert (manifest.schema, manifest.decoder.position_axes, manifest.decoder.mask) == (2, 1, "causal")
    assert (manifest.decoder.deepstack, manifest.processor.placeholder) == (0, None)
    assert load(copy, threads=1).ask(copy / "golden/image.png", "What?", max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("decoder", "position_axes", 2, "position_axes is 2, it must be 1 or 3"),
        ("decoder", "deepstack", 9, "deepstack"),
        ("decoder", "mask", "none", "decoder.mask"),
    ],
)
def test_what_schema_3_added_is_checked(copy: Path, section: str, name: str, value: object, words: str) -> None:
    edit(copy, lambda content: content[section].update({name: value}))
    with pytest.raises(BundleError, match=words):
        open_bundle(copy)


def test_no_folder_and_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"has no manifest.json: give a folder made by"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file, a bundle is a folder"):
        open_bundle(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "nonsense", "[" * 100_000, '{"schema": "1"}', '{"schema": true}', "{}"]
)
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(copy)


def test_a_manifest_that_is_not_text(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=4), r"newer svdprune \(schema 4, this one reads 3\): upgrade svdprune"),
        (lambda m: m.update(schema=0), "schema 0 was never written"),
        (lambda m: m.pop("vision"), "the field vision is missing"),
        (lambda m: m["vision"].pop("keep"), r"the field vision.keep is missing"),
        (lambda m: m["vision"].update(keep="32"), r"vision.keep must be a whole number, not a string"),
        (lambda m: m["vision"].update(keep=None), r"vision.keep must be a whole number, not null"),
        (lambda m: m["vision"].update(keep=True), r"vision.keep must be a whole number, not true or false"),
        (lambda m: m["vision"].update(keep=2.5), r"vision.keep must be a whole number, not a number"),
        (lambda m: m["vision"].update(keep=17), r"vision.keep 17 is more than vision.tokens 16"),
        (lambda m: m["vision"].update(keep=0), r"vision.keep is 0, it must be 1 or more"),
        (lambda m: m["vision"].update(grid=[4, 5]), r"vision.grid \[4, 5\] does not make vision.tokens 16"),
        (lambda m: m["vision"].update(grid=[4, "4"]), r"vision.grid\[1\] must be a whole number"),
        (lambda m: m["vision"].update(input="int8"), r'vision.input is "int8", it must be one of: uint8, float32'),
        (lambda m: m["vision"].update(hidden=8), r"vision.hidden 8 is not decoder.hidden 32"),
        (lambda m: m["vision"].update(selector=[]), r"vision.selector must be an object, not a list"),
        (lambda m: m["vision"]["selector"].update(centre="no"), r"vision.selector.centre must be true or false"),
        (lambda m: m["decoder"].update(eos=2), r"decoder.eos must be a list, not a whole number"),
        (lambda m: m["decoder"].update(eos=[-1]), r"decoder.eos holds -1"),
        (lambda m: m["decoder"].update(context=0), r"decoder.context is 0"),
        (lambda m: m["decoder"]["generation"].update(top_p="all"), r"decoder.generation.top_p must be a number"),
        (lambda m: m.update(positions="absolute"), "positions is .absolute., it must be one of: compact, original"),
        (lambda m: m.update(colour="red"), "the field colour is not known to this svdprune"),
        (lambda m: m["files"]["vision.onnx"].pop("size"), r"vision.onnx'\].size is missing"),
        (lambda m: m["files"].pop("vision.onnx"), r"uses vision.onnx and does not list it"),
        (lambda m: m["files"].update({"../x": {"sha256": "0", "size": 1}}), r"'../x', which is outside the bundle"),
    ],
)
def test_a_manifest_that_is_wrong_names_the_field(
    copy: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=words):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "C:/x", "a\0b"])
def test_names_outside_the_bundle(name: str) -> None:
    with pytest.raises(BundleError, match="outside the bundle"):
        check_name(name)


def test_names_inside_the_bundle() -> None:
    for name in ("vision.onnx", "decoder/model.onnx.data", "a..b/c"):
        check_name(name)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder/embed_tokens.npy", "golden/image.png"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"lacks its file {name}"):
        open_bundle(copy, verify=False)


@pytest.mark.parametrize("name", ["vision.onnx", "processor/tokenizer.json"])
def test_a_changed_byte_is_found(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} was changed since the bundle was written"):
        open_bundle(copy)
    open_bundle(copy, verify=False)  # sizes only


def test_a_changed_size_is_found_without_hashing(copy: Path) -> None:
    with (copy / "vision.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"vision.onnx has [\d,]+ bytes and should have"):
        open_bundle(copy, verify=False)


def test_files_beside_are_no_matter(copy: Path) -> None:
    (copy / "engines").mkdir()
    (copy / "engines" / "cache").write_text("made on the device")
    open_bundle(copy)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_stays_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), write_bundle(tmp_path / "out") as writer:
        writer.file("decoder/part").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path, wrapped: bool) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    words = r"disk of .* is full and the bundle was not written, it needs more than the .* free there: make room"
    with pytest.raises(UserError, match=words), write_bundle(tmp_path / "out") as writer:
        writer.file("part").write_text("half")
        if wrapped:
            raise RuntimeError("the library's own words") from full
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_that_a_library_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What np.save raises has no error number, what torch raises does not even speak of the disk."""
    usage = shutil.disk_usage(tmp_path)
    for error in (OSError("1000000 requested and 38384 written"), RuntimeError("unexpected pos 576 vs 534")):
        with pytest.raises(UserError, match="is full") as caught, write_bundle(tmp_path / "out") as writer:
            writer.file("part").write_text("half")
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
            raise error
        assert caught.value.__cause__ is error
        monkeypatch.undo()
        with pytest.raises(type(error)), write_bundle(tmp_path / "out"):
            raise error  # with room on the disk it is what it says
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="is full"):
        tiny.make_bundle(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_the_work(tmp_path: Path) -> None:
    words = r"free and the bundle needs 1,000,000,000.0 GB"
    with pytest.raises(UserError, match=words), write_bundle(tmp_path / "out", need=10**18):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target(bundle: Path, tmp_path: Path) -> None:
    target = tiny.make_bundle(tmp_path / "out")
    with pytest.raises(UserError, match="exists already"), write_bundle(target):
        pytest.fail("the block must not run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a bundle and is not replaced"), write_bundle(other, overwrite=True):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"), write_bundle(tmp_path / "file", overwrite=True):
        pytest.fail("the block must not run")
    assert (other / "thesis.txt").read_text() == "precious"


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    open_bundle(tiny.make_bundle(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_or_leaves(copy: Path) -> None:
    (copy / "old").write_text("old")
    source = open_bundle(copy)
    with pytest.raises(RuntimeError), write_bundle(copy, overwrite=True):
        raise RuntimeError
    open_bundle(copy)
    assert (copy / "old").exists()
    with write_bundle(copy, overwrite=True) as writer:
        for name in source.manifest.files:
            shutil.copy(copy / name, writer.file(name))
        writer.manifest = source.manifest
    assert not (copy / "old").exists()
    open_bundle(copy)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_an_incomplete_bundle_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not list it"), write_bundle(tmp_path / "out") as writer:
        writer.file("vision.onnx").write_text("x")
        writer.manifest = tiny.manifest()
    with pytest.raises(ValueError, match=r"set writer\.manifest"), write_bundle(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"), write_bundle(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
