"""The two files of a calibration: written together or not at all, and read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from svdprune.calib.calibration import ARRAYS, FILE, SCHEMA, Arrays, Calibration
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.fields import read_fields

AGAIN = "calibrate again"


def write_calibration(
    calibration: Calibration, arrays: dict[str, np.ndarray], out: Path, overwrite: bool = False
) -> Calibration:
    """Write both files into the folder `out`, which appears whole or not at all.

    Returns:
        The calibration as written: with the arrays' file and hash.

    Raises:
        UserError: `out` is taken or cannot be written.
    """
    check_place(out, overwrite)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own options
    content = packed.getvalue()
    written = dataclasses.replace(calibration, arrays=Arrays(ARRAYS, hashlib.sha256(content).hexdigest()))
    target = out.absolute()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        try:
            (partial / ARRAYS).write_bytes(content)
            (partial / FILE).write_text(written.to_json(), encoding="utf-8")
            if target.is_dir():
                shutil.rmtree(target)  # `check_place` has seen that it is empty or a calibration
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the calibration cannot be written to {out} ({error.strerror}): choose another place"
        ) from error
    return written


def check_place(out: Path, overwrite: bool) -> None:
    """Refuse a place where no calibration could be written, before the work.

    Raises:
        UserError: a file, a folder that holds something else, or one whose parent is not there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another place for the calibration")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent}: make it, or choose another place")
    if out.is_dir() and (held := {place.name for place in out.iterdir()}):
        if not held <= {FILE, ARRAYS}:
            raise UserError(f"{out} holds other files and is not replaced: choose another place for the calibration")
        if not overwrite:
            raise UserError(f"{out} holds a calibration already: choose another place, or --overwrite it")


def read_calibration(folder: str | Path) -> tuple[Calibration, dict[str, np.ndarray]]:
    """The calibration in a folder and its arrays, checked against each other.

    Raises:
        UserError: not there, truncated, changed, of a newer svdprune, or numbers that cannot all be true; the sentence
            names the file and the field.
    """
    folder = Path(folder)
    place = folder / FILE
    if folder.name == FILE and folder.is_file():
        folder, place = folder.parent, folder
    if not place.is_file():
        raise UserError(f"{folder} has no {FILE}: give a folder made by `svdprune calibrate`")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place} cannot be read or is not valid JSON ({error}): {AGAIN}") from error
    if isinstance(content, dict) and isinstance(content.get("schema"), int) and content["schema"] > SCHEMA:
        raise UserError(
            f"{place} was made by a newer svdprune (schema {content['schema']}, this one reads {SCHEMA}): "
            "upgrade svdprune"
        )
    try:
        found = read_fields(Calibration, content, str(place), again=AGAIN)
    except BundleError as error:
        raise UserError(str(error)) from error
    _check(found, str(place))
    return found, _read_arrays(folder, found)


def _check(found: Calibration, where: str) -> None:
    features, settings = found.features, found.settings
    limit = min(features.tokens, features.channels)
    for fits, what in (
        (found.schema == SCHEMA, f"schema {found.schema} was never written by svdprune"),
        (limit >= 1, f"features of {features.tokens} tokens x {features.channels} channels cannot be"),
        (
            len(features.grid) == 2 and 1 <= int(np.prod(features.grid)) <= features.tokens,  # of tiles: one's grid
            f"features.grid {features.grid} does not make features.tokens {features.tokens}",
        ),
        (1 <= settings.rank <= limit, f"settings.rank {settings.rank} is not from 1 to {limit}"),
        (
            settings.rank <= settings.block <= limit,
            f"settings.block {settings.block} is not from the rank {settings.rank} to {limit}",
        ),
        (settings.iterations >= 1, f"settings.iterations {settings.iterations} is not 1 or more"),
        (found.model.sha256 is not None, "model.sha256 is missing"),
        (found.arrays.file == ARRAYS, f"arrays.file is {found.arrays.file!r}, not {ARRAYS}"),
    ):
        if not fits:
            raise UserError(f"{where}: {what}: {AGAIN}")


def _read_arrays(folder: Path, found: Calibration) -> dict[str, np.ndarray]:
    place = folder / ARRAYS
    try:
        content = place.read_bytes()
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}): {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != found.arrays.sha256:
        raise UserError(f"{place} was changed since the calibration was written (its SHA-256 differs): {AGAIN}")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} is not a file of arrays ({error}): {AGAIN}") from error
    for name in ("start", "start_centred"):
        start = arrays.get(name)
        fits = start is not None and start.ndim == 2 and start.shape[0] == found.features.channels
        if start is None or not fits or start.shape[1] < found.settings.block or not np.isfinite(start).all():
            shape = "no array" if start is None else f"an array of shape {start.shape}"
            raise UserError(
                f"{place} has {shape} {name!r} where ({found.features.channels}, {found.settings.block} or more) "
                f"finite numbers are needed: {AGAIN}"
            )
    return arrays
