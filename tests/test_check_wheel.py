"""The wheel check tells what a wheel lacks."""

from __future__ import annotations

import zipfile

from tools.check_wheel import DATA, MODEL, PACKAGES, ROOT, missing


def everything():
    """Every file that a whole wheel holds, relative to the repository."""
    names = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names += [f"{package}/py.typed" for package in PACKAGES]
    names += [path.relative_to(ROOT).as_posix() for path in (ROOT / DATA).rglob("*") if path.is_file()]
    names += [path.relative_to(ROOT).as_posix() for path in (ROOT / "runtime/report").glob("page.*")]
    return {*names, *(f"{DATA}/{name}" for name in MODEL)}


def wheel(folder, names):
    """An archive with empty files of these names, as a wheel lays them out."""
    path = folder / "svdprune.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"svdprune/{name}", "")
    return path


def test_a_whole_wheel_lacks_nothing(tmp_path):
    assert missing(wheel(tmp_path, everything())) == []


def test_what_is_missing_is_named(tmp_path):
    left_out = {"runtime/cli/run.py", "calib/py.typed", f"{DATA}/{MODEL[1]}"}
    assert missing(wheel(tmp_path, everything() - left_out)) == sorted(left_out)
