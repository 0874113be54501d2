"""The files of an evaluation: all of them, or none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from svdprune.calib.evaluate.plot import plot
from svdprune.calib.evaluate.report import Report
from svdprune.calib.evaluate.tables import markdown, to_csv
from svdprune.runtime.errors import UserError

NAME = "evaluation"


def check_folder(out: Path) -> None:
    """Refuse a folder that could not be written, before the work."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder for the results")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent}: make it, or choose another place for the results")


def write_files(report: Report, out: Path, title: str) -> list[Path]:
    """`evaluation.json`, `.csv`, `.md` and `.png` in `out`, which is made; those of an earlier evaluation are replaced.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = {
        "json": (json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n").encode(),
        "csv": to_csv(report).encode(),
        "md": (markdown(report) + "\n").encode(),
        "png": plot(report, title),
    }
    partial = out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        try:
            for suffix, content in contents.items():
                (partial / f"{NAME}.{suffix}").write_bytes(content)
            out.mkdir(exist_ok=True)
            for suffix in contents:
                os.replace(partial / f"{NAME}.{suffix}", out / f"{NAME}.{suffix}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the results cannot be written to {out} ({error.strerror}): choose another place") from error
    return [out / f"{NAME}.{suffix}" for suffix in contents]
