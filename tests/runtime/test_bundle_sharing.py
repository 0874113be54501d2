"""Two bundles that have files in common on the disk: linked only where they are whole, and said by inspect."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from svdprune.runtime import BundleError, UserError, open_bundle, write_bundle
from svdprune.runtime.bundle_reader import shared_files
from svdprune.runtime.cli.inspect import command

DECODER = ("decoder/model.onnx", "decoder/embed_tokens.npy")


@pytest.fixture
def first(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "first"))


def second(first: Path, names: tuple[str, ...] = DECODER) -> Path:
    """A bundle beside the first that takes its decoder and has the rest for itself."""
    given = open_bundle(first)
    target = first.parent / "second"
    with write_bundle(target) as writer:
        for name in given.manifest.files:
            if name in names:
                writer.link(name, given)
            else:
                shutil.copy(first / name, writer.file(name))
        writer.manifest = dataclasses.replace(given.manifest, files={})
    return target


def test_linked_files_are_one_file_and_the_bundle_is_whole(first: Path) -> None:
    other = second(first)
    opened = open_bundle(other)  # hashes and all
    assert opened.manifest.files == open_bundle(first).manifest.files
    for name in opened.manifest.files:
        assert os.path.samefile(first / name, other / name) == (name in DECODER)
    assert shared_files(opened) == {name: [first.absolute()] for name in DECODER}
    shutil.rmtree(first)
    assert shared_files(open_bundle(other)) == {}  # whole without the first


def test_a_file_whose_other_bundle_is_elsewhere(first: Path, tmp_path: Path) -> None:
    other = second(first)
    (tmp_path / "away").mkdir()
    os.rename(first, tmp_path / "away" / "first")
    assert shared_files(open_bundle(other)) == {name: [] for name in DECODER}
    result = CliRunner().invoke(command, [str(other)])
    assert "once with a folder that is not beside this one" in " ".join(result.output.split())


def test_inspect_says_what_is_shared(first: Path) -> None:
    other = second(first)
    told = " ".join(CliRunner().invoke(command, [str(other)]).output.split())
    assert "on the disk once with first: decoder/embed_tokens.npy, decoder/model.onnx" in told
    found = json.loads(CliRunner().invoke(command, [str(other), "--json"]).output)["shared"]
    assert found == {name: [str(first.absolute())] for name in DECODER}
    alone = CliRunner().invoke(command, [str(shutil.copytree(other, first.parent / "copy"))]).output
    assert "vision.onnx" in alone and "on the disk once" not in alone


def test_a_changed_file_is_not_shared(first: Path) -> None:
    model = first / DECODER[0]
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    given = open_bundle(first, verify=False)
    with (
        pytest.raises(BundleError, match=r"was changed since the bundle was written .*do not share it"),
        write_bundle(first.parent / "second") as writer,
    ):
        writer.link(DECODER[0], given)
    assert sorted(path.name for path in first.parent.iterdir()) == ["first"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_link_that_cannot_be_made_is_refused_not_copied(
    first: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, place: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="one file system that has hard links"):
        second(first)
    assert sorted(path.name for path in first.parent.iterdir()) == ["first"]
