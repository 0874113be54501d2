"""The files of a calibration: whole or absent, and read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svdprune.calib.calibration import (
    ARRAYS,
    FILE,
    Arrays,
    Calibration,
    Candidate,
    Energy,
    Features,
    Pictures,
    Settings,
    Trial,
    Wished,
    digest,
)
from svdprune.calib.calibration_files import check_place, read_calibration, write_calibration
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import ModelInfo

RECORD = Calibration(
    model=ModelInfo("tiny", "llava", None, "ab" * 32),
    features=Features(9, 16, [3, 3], -2),
    pictures=Pictures("scenes", "drawn", 0, 8, 4, 2, 2, 6, 0, [], ["0" * 32]),
    wished=Wished(0.99, [4], None, 0.9),
    energy=[Energy("-2", False, {"0.9": 3}, 0.9, 2, 4)],
    criterion="in words",
    candidates=[Candidate("leverage:rank=3", 4, 6, 0.5, 0.4, 0.6, 0.5, 0.1, "-2", False, 3)],
    best_tap="-2",
    trials=[Trial(1, 3, "calibrated", 0.995, 0.75, 100, 1e6)],
    met=True,
    judged=[Trial(1, 3, "calibrated", 0.995, 0.75, 100, 1e6)],
    settings=Settings(3, 6, 1, False),
    arrays=Arrays("", ""),
    written_by={"svdprune": "1"},
)
HELD = {"start": np.eye(16, 8, dtype=np.float32), "start_centred": np.eye(16, 8, dtype=np.float32)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    curve = np.linspace(0.5, 1.0, 9)
    written = write_calibration(RECORD, {**HELD, "energy/-2/raw": curve}, tmp_path / "c")
    found, arrays = read_calibration(tmp_path / "c")
    assert found == written and found.arrays.file == ARRAYS
    np.testing.assert_array_equal(arrays["energy/-2/raw"], curve)
    assert read_calibration(tmp_path / "c" / FILE)[0] == written  # the file itself is as good as its folder
    assert [place.name for place in tmp_path.iterdir()] == ["c"]


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    write_calibration(RECORD, HELD, tmp_path / "c")
    with pytest.raises(UserError, match="holds a calibration already"):
        write_calibration(RECORD, HELD, tmp_path / "c")
    write_calibration(dataclasses.replace(RECORD, best_tap="-1"), HELD, tmp_path / "c", overwrite=True)
    assert read_calibration(tmp_path / "c")[0].best_tap == "-1"
    (tmp_path / "c" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        check_place(tmp_path / "c", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_place(tmp_path / "c" / "mine.txt", overwrite=True)
    with pytest.raises(UserError, match="there is no folder"):
        check_place(tmp_path / "gone" / "c", overwrite=True)


def test_nothing_stays_when_the_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svdprune.calib.calibration_files.os.rename", full)
    with pytest.raises(UserError, match="cannot be written"):
        write_calibration(RECORD, HELD, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def spoil(folder: Path, **changes: Any) -> None:
    """Change fields of `calibration.json`, named with dots; None removes one."""
    content = json.loads((folder / FILE).read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = content
        for name in parents:
            place = place[name]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": None}, "the field settings is missing: calibrate again"),
        ({"settings__rank": None}, "the field settings.rank is missing: calibrate again"),
        ({"settings__rank": "3"}, "settings.rank must be a whole number"),
        ({"settings__rank": 40}, "settings.rank 40 is not from 1 to 9"),
        ({"settings__block": 2}, "settings.block 2 is not from the rank 3"),
        ({"settings__block": 9}, r"an array of shape \(16, 8\) 'start' where \(16, 9 or more\)"),
        ({"settings__iterations": 0}, "settings.iterations 0"),
        ({"features__grid": [3, 4]}, "does not make features.tokens"),
        ({"features__channels": 12}, r"shape \(16, 8\) 'start'"),
        ({"model__sha256": None}, "model.sha256 is missing"),
        ({"arrays__file": "../x.npz"}, "arrays.file is '../x.npz'"),
        ({"met": 1}, "met must be true or false"),
        ({"extra": 1}, "extra is not known to this svdprune: upgrade"),
        ({"schema": 2}, "made by a newer svdprune"),
        ({"schema": 0}, "schema 0 was never written"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_calibration(RECORD, HELD, tmp_path / "c")
    spoil(tmp_path / "c", **changes)
    with pytest.raises(UserError, match=said):
        read_calibration(tmp_path / "c")


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no calibration\.json: give a folder made by"):
        read_calibration(tmp_path)
    write_calibration(RECORD, HELD, tmp_path / "c")
    text = (tmp_path / "c" / FILE).read_text()
    (tmp_path / "c" / FILE).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is not valid JSON"):
        read_calibration(tmp_path / "c")
    (tmp_path / "c" / FILE).write_text("[]")
    with pytest.raises(UserError, match="must be an object"):
        read_calibration(tmp_path / "c")
    (tmp_path / "c" / FILE).write_text(text)
    content = (tmp_path / "c" / ARRAYS).read_bytes()
    (tmp_path / "c" / ARRAYS).write_bytes(content[:-20])
    with pytest.raises(UserError, match="SHA-256 differs"):
        read_calibration(tmp_path / "c")
    spoil(tmp_path / "c", arrays__sha256=hashlib.sha256(content[:-20]).hexdigest())
    with pytest.raises(UserError, match="is not a file of arrays"):
        read_calibration(tmp_path / "c")
    (tmp_path / "c" / ARRAYS).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_calibration(tmp_path / "c")


@pytest.mark.parametrize("spoiled", [{"start": np.full((16, 8), np.nan, np.float32)}, {"start": np.ones(16)}])
def test_arrays_that_are_no_start_are_refused(tmp_path: Path, spoiled: dict[str, np.ndarray]) -> None:
    write_calibration(RECORD, HELD | spoiled, tmp_path / "c")
    with pytest.raises(UserError, match="finite numbers are needed"):
        read_calibration(tmp_path / "c")


def test_digests_tell_pictures_apart() -> None:
    picture = np.zeros((4, 6, 3), np.uint8)
    assert digest(picture) == digest(picture.copy()) != digest(picture.reshape(6, 4, 3))
    other = picture.copy()
    other[0, 0, 0] = 1
    assert digest(other) != digest(picture)
