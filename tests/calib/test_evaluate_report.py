"""Outcomes to figures, tables, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdprune.calib.evaluate.files import check_folder, write_files
from svdprune.calib.evaluate.outcome import Outcome, Setting, mean_outcome
from svdprune.calib.evaluate.report import Report, Row, summarise
from svdprune.calib.evaluate.tables import markdown, table, to_csv
from svdprune.runtime.errors import UserError


def outcomes(right: float, pictures: int = 40, seed: int = 0, labelled: bool = True) -> list[Outcome]:
    """Two questions a picture, of two kinds, the second always right."""
    rng = np.random.default_rng(seed)
    found = []
    for picture in range(pictures):
        for kind, score in (("hard", float(rng.random() < right)), ("easy", 1.0)):
            found.append(Outcome(picture, kind, score if labelled else None, None, score, (1 + score) / 2, 1.0 - score))
    return found


def report(labelled: bool = True, pictures: int = 40) -> Report:
    none, best, chance = (
        Setting("none", 99, "compact"),
        Setting("leverage", 9, "compact"),
        Setting("random", 9, "compact"),
    )
    runs = {
        none: [outcomes(1.0, pictures, labelled=labelled)],
        best: [outcomes(0.8, pictures, labelled=labelled)],
        chance: [outcomes(0.3, pictures, seed, labelled) for seed in range(5)],
    }
    rows = summarise(runs, {best: [0.001, 0.003, 0.002], chance: [0.0] * 3})
    return Report({"model": "m", "data": "drawn", "questions": "80"}, 99, pictures, rows)


def row(found: Report, selector: str) -> Row:
    return next(one for one in found.rows if one.selector == selector)


def test_seeds_are_averaged_question_by_question_and_their_spread_kept() -> None:
    one = mean_outcome([Outcome(0, "k", 1.0, None, 1.0, 1.0, 0.0), Outcome(0, "k", 0.0, None, 0.0, 0.5, 0.4)])
    assert one == Outcome(0, "k", 0.5, None, 0.5, 0.75, 0.2)
    found = row(report(), "random")
    each = [np.mean([o.score for o in outcomes(0.3, 40, seed)]) for seed in range(5)]
    assert found.spread == (min(each), max(each))
    assert found.accuracy is not None and found.accuracy.value == pytest.approx(np.mean(each))
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    assert found.above_random is None


def test_figures_of_a_setting() -> None:
    found = row(report(), "leverage")
    assert set(found.kinds) == {"hard", "easy"} and found.kinds["easy"].value == 1.0
    assert found.questions == 80 and found.select_seconds == 0.002
    assert found.accuracy is not None and found.accuracy.value == pytest.approx((found.kinds["hard"].value + 1) / 2)
    assert found.agreement is not None and found.kl is not None and found.matched is not None
    assert found.kl.value == pytest.approx(1 - found.accuracy.value)
    chance = row(report(), "random").accuracy
    assert found.above_random is not None and chance is not None
    assert found.above_random.value == pytest.approx(found.accuracy.value - chance.value)
    assert 0 < found.above_random.low < found.above_random.high < 1


def test_without_labels_agreement_is_compared() -> None:
    found = report(labelled=False)
    assert found.metric == "agreement" and not found.labelled
    leverage = row(found, "leverage")
    assert leverage.accuracy is None and leverage.kinds == {} and leverage.headline == leverage.agreement
    assert leverage.above_random is not None and leverage.above_random.low > 0
    assert not any(name.startswith("accuracy") for name in table(found)[0])


def test_a_few_pictures_are_not_called_significant() -> None:
    assert row(report(pictures=5), "leverage").above_random is None


def test_f1_of_yes_no_questions() -> None:
    key = Setting("none", 9, "compact")
    found = [Outcome(n, None, float(n % 3 != 0), n % 2 == 0, 1.0, 1.0, 0.0) for n in range(30)]
    (only,) = summarise({key: [found]}, {}, binary=True)
    hit = sum(o.score or 0 for o in found if o.positive)
    missed, false = 15 - hit, sum(1 - (o.score or 0) for o in found if not o.positive)
    assert only.f1 == pytest.approx(2 * hit / (2 * hit + missed + false))
    assert "F1" in table(Report({"model": "m"}, 9, 30, [only]))[0]


def test_the_table_stars_what_leaves_chance_behind() -> None:
    columns, cells = table(report())
    assert all(len(line) == len(columns) for line in cells)
    beside = {line[0]: line[columns.index("- random")] for line in cells}
    assert beside["leverage"].startswith("+0.") and beside["leverage"].endswith("*")
    assert beside["random"].startswith("(0.")
    assert max(sum(len(cell) + 3 for cell in line) for line in cells) < 100


def test_markdown_and_csv_hold_every_kind() -> None:
    text = markdown(report())
    head = next(line for line in text.splitlines() if line.startswith("| selector"))
    assert "| hard | easy |" in head
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    rows = list(csv.DictReader(io.StringIO(to_csv(report()))))
    assert [r["selector"] for r in rows] == ["none", "leverage", "random"]
    best = rows[1]
    assert float(best["kind hard low"]) < float(best["kind hard"]) < float(best["kind hard high"])
    assert best["lowest seed"] == "" and rows[2]["lowest seed"] != ""


def test_files_are_written_together_and_replace_older_ones(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "results"
    for _ in range(2):
        written = write_files(report(), out, "a title")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in written)
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    content = json.loads((out / "evaluation.json").read_text())
    assert content["rows"][1]["selector"] == "leverage"
    pixels = np.asarray(Image.open(out / "evaluation.png").convert("RGB"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    red = (np.abs(pixels.astype(int) - [0xC4, 0x32, 0x1F]).max(2) < 12).sum()
    assert red > 20  # leverage's mark is there; with one K a line is a point


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: give a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(UserError, match="there is no folder"):
        check_folder(tmp_path / "gone" / "results")
