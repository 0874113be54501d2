"""Where a page goes: beside the bundle, or into it without a moment in which the bundle is not valid."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from svdprune.runtime.bundle import MANIFEST, Bundle, sha256_of
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import FileInfo, Manifest
from svdprune.runtime.report import PAGE


def default_place(bundle: Bundle) -> Path:
    """``<bundle>-report.html`` in the working directory."""
    return Path(f"{bundle.path.resolve().name}-report.html")


def check_place(bundle: Bundle, out: Path) -> None:
    """Refuse a place where the page cannot be, before the work.

    Raises:
        UserError: a folder, no such folder, not a name of a page, or a file that the bundle needs.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} is not the name of a page: let it end in .html")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give a file's name in it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.absolute().parent}")
    if (name := _inside(bundle, out)) is not None and name != PAGE and name in bundle.manifest.files:
        raise UserError(f"{name} is another file of the bundle: choose another place, or {bundle.path / PAGE}")


def put_page(bundle: Bundle, page: str, out: Path) -> None:
    """Write the page at ``out``, whole or not at all.

    The bundle's own ``report.html`` is replaced in three steps, after each of which the bundle is valid: the manifest
    without the page, the page, the manifest with its new hash.

    Raises:
        UserError: it cannot be written there.
    """
    check_place(bundle, out)
    data = page.encode("utf-8")
    if _inside(bundle, out) != PAGE:
        _replace(out, data)
        return
    others = {name: info for name, info in bundle.manifest.files.items() if name != PAGE}
    _put_manifest(bundle, dataclasses.replace(bundle.manifest, files=others))
    _replace(out, data)
    listed = {**others, PAGE: FileInfo(sha256_of(out), len(data))}
    _put_manifest(bundle, dataclasses.replace(bundle.manifest, files=dict(sorted(listed.items()))))


def _inside(bundle: Bundle, out: Path) -> str | None:
    """The name inside the bundle, None for a place outside."""
    try:
        return out.resolve().relative_to(bundle.path.resolve()).as_posix()
    except ValueError:
        return None


def _put_manifest(bundle: Bundle, manifest: Manifest) -> None:
    _replace(bundle.path / MANIFEST, manifest.to_json().encode("utf-8"))


def _replace(place: Path, data: bytes) -> None:
    """Beside its place, flushed, and renamed."""
    beside = place.absolute().with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, place)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): choose another place with --out") from error
    finally:
        beside.unlink(missing_ok=True)
