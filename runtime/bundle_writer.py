"""Write a bundle whole or not at all: in a temporary sibling, hashed, checked, flushed and renamed."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdprune.runtime.bundle_reader import MANIFEST, Bundle, open_bundle, sha256_of
from svdprune.runtime.errors import BundleError, SvdpruneError, UserError
from svdprune.runtime.manifest import FileInfo, Manifest

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = 1 << 16  # bytes: with less than this free, a failed write failed for want of room


class BundleWriter:
    """What ``write_bundle`` yields: put the files under ``path`` and set ``manifest`` before the block ends.

    ``manifest.files`` is filled in from what lies under ``path``; whatever it held is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None
        self._linked: dict[str, FileInfo] = {}

    def file(self, name: str) -> Path:
        """Where to write the file ``name`` ("decoder/model.onnx"); its folder is made."""
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def link(self, name: str, other: Bundle) -> None:
        """Take the file ``name`` of another bundle as this one's, too: one file on the disk with two names.

        Its SHA-256 is compared first. It lives until the last bundle that has it is deleted; svdprune changes no file
        of a bundle in place.

        Raises:
            BundleError: the file was changed since the other bundle was written.
            UserError: a hard link to it cannot be made from here (another disk, or a file system without them).
        """
        source, info = other.file(name), other.manifest.files[name]
        if sha256_of(source) != info.sha256:
            raise BundleError(
                f"{source} was changed since the bundle was written (its SHA-256 differs): do not share it"
            )
        try:
            os.link(source, self.file(name))
        except OSError as error:
            raise UserError(
                f"{source} cannot be shared with {self.path.parent} ({error.strerror}): both must be on one file "
                "system that has hard links; export without sharing, or beside that bundle"
            ) from error
        self._linked[name] = info

    def hashed(self, name: str) -> FileInfo:
        """Hash and size of a file under ``path``; that of a linked one was compared when it was linked."""
        place = self.path / name
        return self._linked.get(name) or FileInfo(sha256_of(place), place.stat().st_size)


@contextmanager
def write_bundle(path: str | Path, overwrite: bool = False, need: int | None = None) -> Iterator[BundleWriter]:
    """Write a bundle to ``path``, which appears only when the block has ended well.

    Args:
        path: the bundle's folder; it must not exist, or be an empty folder, or a bundle with ``overwrite``.
        overwrite: replace a bundle that is there. Any other folder is never replaced.
        need: bytes the bundle will take, where known: refused before any work when the disk has less.

    Raises:
        UserError: ``path`` is taken or cannot be written, or the disk is full. Nothing half-written stays, whatever
            ends the block (Ctrl-C too).
    """
    target = Path(os.path.abspath(path))
    check_bundle_place(target, overwrite)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if need is not None and free < need:
            raise UserError(
                f"the disk of {target.parent} has {_size(free)} free and the bundle needs {_size(need)}: "
                "make room or choose another place"
            )
        if partial.exists():  # left by a process of the same number that was killed outright
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"the bundle cannot be written at {target} ({error.strerror}): choose another place") from error
    try:
        writer = BundleWriter(partial)
        yield writer
        _finish(writer)
        _move(partial, target)
    except BaseException as error:
        full = _disk_full(error, target.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            room = _size(shutil.disk_usage(target.parent).free)
            needed = f"more than the {room} free there" if need is None else f"{_size(need)}, of which {room} are free"
            raise UserError(
                f"the disk of {target.parent} is full and the bundle was not written, it needs {needed}: "
                "make room or choose another place"
            ) from error
        raise


def check_bundle_place(target: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, before any work.

    Raises:
        UserError: a file, a folder that is not a bundle, or a bundle without ``overwrite``.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file: choose another place for the bundle")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists already: choose another place, or overwrite it")
    if not (target / MANIFEST).is_file():
        raise UserError(f"{target} is not a bundle and is not replaced: choose another place")


def _finish(writer: BundleWriter) -> None:
    """Hash every file, write the manifest, read the bundle back, and flush all of it to the disk."""
    if writer.manifest is None:
        raise ValueError("write_bundle: set writer.manifest before the block ends")
    files = {}
    for place in sorted(writer.path.rglob("*")):
        name = place.relative_to(writer.path).as_posix()
        if place.is_file() and name != MANIFEST:
            files[name] = writer.hashed(name)
    manifest = dataclasses.replace(writer.manifest, files=files)
    (writer.path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    open_bundle(writer.path, verify=False)  # the hashes were computed a moment ago
    for place in [*writer.path.rglob("*"), writer.path]:
        _sync(place)


def _move(partial: Path, target: Path) -> None:
    """Put ``partial`` at ``target``; an old bundle there is moved aside first and put back when that fails."""
    aside = None
    if os.path.lexists(target):
        aside = target.parent / f".{target.name}.old-{os.getpid()}"
        os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    _sync(target.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names where the system can (Windows cannot)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a full disk is behind the error, also where a library wrapped it or lost its cause.

    NumPy, torch and safetensors report a full disk without its error number: then its words or the free space decide.
    """
    foreign = isinstance(error, Exception) and not isinstance(error, SvdpruneError)
    if foreign and (os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < _NO_ROOM):
        return True
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
