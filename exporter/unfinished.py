"""A bundle that is being written, opened before its files are hashed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.manifest import FileInfo, Manifest


def unfinished(folder: Path, manifest: Manifest) -> Bundle:
    """The bundle as it is so far: sizes of all files, no hashes, which are computed once, at the end."""
    files = {
        place.relative_to(folder).as_posix(): FileInfo("", place.stat().st_size)
        for place in sorted(folder.rglob("*"))
        if place.is_file()
    }
    return Bundle(folder, dataclasses.replace(manifest, files=files))
