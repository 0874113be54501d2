"""Open a bundle and trust it, or say which file is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from svdprune.runtime.errors import BundleError
from svdprune.runtime.manifest import FileInfo, Manifest

MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # bytes read at a time: a decoder's weights may be larger than the memory


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a file named as in the manifest ("decoder/model.onnx").

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {name} in its manifest: export the bundle again")
        return self.path / name

    def read_text(self, name: str) -> str:
        """The text of a UTF-8 file of the bundle.

        Raises:
            BundleError: not listed, unreadable or not UTF-8.
        """
        try:
            return self.file(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.path / name} cannot be read ({error}): export the bundle again") from error

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the bundle.

        Raises:
            BundleError: not listed, unreadable or not JSON.
        """
        try:
            return json.loads(self.read_text(name))
        except (json.JSONDecodeError, RecursionError) as error:
            raise BundleError(f"{self.path / name} is not valid JSON ({error}): export the bundle again") from error


def open_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Open the bundle in the folder ``path``.

    Args:
        path: the bundle's folder.
        verify: also compare the SHA-256 of every file (reads all of them). Presence and sizes are always checked.

    Raises:
        BundleError: no such folder, not a bundle, made by a newer svdprune, or a file that is missing or changed; the
            sentence names it.
    """
    folder = Path(path)
    if not folder.exists():
        raise BundleError(f"no bundle at {folder}: there is no such folder")
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file, a bundle is a folder: give the folder that holds {MANIFEST}")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} is not a bundle, it has no {MANIFEST}: give a folder made by `svdprune-export`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST} cannot be read ({error}): copy or export the bundle again") from error
    try:
        manifest = Manifest.from_json(text)
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error
    for name in manifest.files:
        check_name(name)
    for name in _named_files(manifest):
        if name not in manifest.files:
            raise BundleError(f"{folder}: manifest.json uses {name} and does not list it: export the bundle again")
    for name, info in manifest.files.items():
        _check_file(folder / name, name, info, verify)
    return Bundle(folder, manifest)


def check_name(name: str) -> None:
    """Refuse a file name that could point outside the bundle's folder.

    Raises:
        BundleError: absolute, with a drive, with ``..`` or a backslash, or empty.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in parts[0] or ".." in parts:
        raise BundleError(f"manifest.json names the file {name!r}, which is outside the bundle: do not use this bundle")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def shared_files(bundle: Bundle) -> dict[str, list[Path]]:
    """Files that are on the disk once for this bundle and others beside it (hard links), with those bundles' folders.

    Only folders beside the bundle's own are looked at. An empty list: shared with something that is not there.
    """
    own = {name: (bundle.path / name).stat() for name in bundle.manifest.files}
    linked = {name: stat for name, stat in own.items() if stat.st_nlink > 1}
    if not linked:
        return {}
    found: dict[str, list[Path]] = {name: [] for name in linked}
    for folder in sorted(bundle.path.absolute().parent.iterdir()):
        if not (folder / MANIFEST).is_file() or folder.samefile(bundle.path):
            continue
        for name, stat in linked.items():
            place = folder / name  # links are made under the same name
            if place.is_file() and os.path.samestat(stat, place.stat()):
                found[name].append(folder)
    return found


def _named_files(manifest: Manifest) -> list[str]:
    """Every file that another field of the manifest points to."""
    processor, golden, engine = manifest.processor, manifest.golden, manifest.decoder.engine
    calibration = manifest.calibration
    return [
        *([] if calibration is None else filter(None, vars(calibration).values())),
        *([] if engine is None else [engine.file]),
        *(manifest.vision.file, manifest.decoder.file, manifest.decoder.embedding),
        *(processor.tokenizer, processor.chat_template, processor.image),
        *(golden.image, golden.case, golden.arrays),
    ]


def _check_file(path: Path, name: str, info: FileInfo, verify: bool) -> None:
    again = "copy or export the bundle again"
    if not path.is_file():
        raise BundleError(f"the bundle lacks its file {name} (looked for {path}): {again}")
    try:
        size = path.stat().st_size
        if size != info.size:
            raise BundleError(f"{path} has {size:,} bytes and should have {info.size:,}: {again}")
        if verify and sha256_of(path) != info.sha256:
            raise BundleError(f"{path} was changed since the bundle was written (its SHA-256 differs): {again}")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): {again}") from error
