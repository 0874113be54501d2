"""`--keep auto`: the curve against an evaluation of the same counts, and the bundle that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from svdprune.calib.keep_curve import KeepPoint, read_keep_curve
from svdprune.calib.search import keep_grid
from svdprune.calib.sources import open_source, pictures
from svdprune.exporter.calibrate.auto import Wish, wants_search
from svdprune.exporter.calibrate.keep import Examination, find_keep
from svdprune.exporter.calibrate.look import mark_of
from svdprune.exporter.calibrate.saving import saving_of
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.estimate.config import load_model
from svdprune.exporter.evaluate.contenders import parse_contenders
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import Positions
from svdprune.runtime.targets import TARGETS

COUNT, LIMIT = 6, 4
SELECTOR = SelectorConfig(rank=3)


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Model:
    return Model(Checkpoint(tiny_llava), "tiny")


def examination(model: Model, config: SelectorConfig = SELECTOR, positions: Positions = "compact") -> Examination:
    source = open_source("scenes", limit=COUNT, seed=0)
    return Examination(model, config, None, positions, source.protocol, LIMIT)


@pytest.mark.parametrize("name", ["leverage", "maxmin"])  # scores the same for every K, and not
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_points_are_those_of_an_evaluation(model: Model, name: str, positions: Positions) -> None:
    config = SelectorConfig(name, rank=3) if name == "leverage" else SelectorConfig(name)
    label = "leverage:rank=3" if name == "leverage" else name
    source = open_source("scenes", limit=COUNT, seed=0)
    asked = examination(model, config, positions)
    for sample in source.samples():
        asked.add(sample.name, sample.image, sample.questions)
    report = evaluate_model(model, "tiny", source, parse_contenders([label]), [6, 3], [positions], limit=LIMIT)
    for row in report.rows[1:]:
        point = asked.at(row.keep)
        assert row.agreement is not None and row.kl is not None and row.accuracy is not None
        assert (point.agreement, point.low, point.high) == (row.agreement.value, row.agreement.low, row.agreement.high)
        assert point.kl == pytest.approx(row.kl.value, abs=1e-5) and point.matched == pytest.approx(row.matched)
        assert point.accuracy == row.accuracy.value
    unpruned = report.rows[0].accuracy
    assert unpruned is not None and asked.unpruned_accuracy() == unpruned.value
    assert asked.questions == report.rows[0].questions


def points(monkeypatch: pytest.MonkeyPatch, curve: Callable[[int], float]) -> None:
    """Answers that agree as `curve` says."""

    def at(self: Examination, keep: int, progress: object) -> KeepPoint:
        return KeepPoint(keep, curve(keep), 0.0, 1.0, curve(keep), 1.0 - curve(keep), 0.5)

    monkeypatch.setattr(Examination, "at", at)


def test_the_smallest_count_that_agrees_is_found_and_the_curve_told(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    points(monkeypatch, lambda keep: keep / 9)
    said: list[str] = []
    source = open_source("scenes", limit=COUNT, seed=0)
    curve = find_keep(examination(model), source, 0.6, say=said.append)
    assert curve.keep == 6 and curve.grid == keep_grid(9) == [1, 2, 3, 4, 6, 8]
    assert [line.split(" agreement")[0].split() for line in said[1:]] != [] and "1, 2, 3, 4, 6, 8" in said[0]
    assert {f"K = {p.keep:<4}" for p in curve.points} == {line[:8] for line in said[1:]}
    assert curve.source.pictures == COUNT and curve.source.questions > COUNT and curve.prompt_tokens > 4


def test_a_curve_that_is_not_monotonic_is_said_to_be(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, lambda keep: {3: 1.0, 4: 0.1}.get(keep, float(keep > 4)))
    said: list[str] = []
    curve = find_keep(examination(model), open_source("scenes", limit=COUNT, seed=0), 0.9, say=said.append)
    assert curve.keep == 6 and curve.irregular == [3]
    assert any("not monotonic: K = 3 agrees too" in line for line in said)


def test_no_count_that_agrees_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, lambda keep: 0.5 + keep / 100)
    with pytest.raises(
        UserError, match=r"no K below 9 reaches an agreement of 0\.98 \(the best measured is 0\.580 at K = 8"
    ):
        find_keep(examination(model), open_source("scenes", limit=COUNT, seed=0), 0.98)


def test_too_few_questions_to_tell_are_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, lambda keep: 1.0)
    said: list[str] = []
    find_keep(examination(model), open_source("scenes", limit=4, seed=0), 0.999, say=said.append)
    assert "cannot tell an agreement of 0.999 from 1: give 1000 or more" in said[0]


def test_pictures_that_made_the_start_are_not_asked_about(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, lambda keep: 1.0)
    images = pictures("scenes", at_least=8, limit=8, seed=0)
    excluded = [mark_of(image) for image in images[:3]]
    asked = examination(model)
    find_keep(asked, open_source("scenes", limit=8, seed=0), 0.9, excluded, pictures=4)
    assert len(asked.pictures) == 4
    expected = [model.see(image).tokens for image in images[3:7]]
    for one, tokens in zip(asked.pictures, expected, strict=True):
        np.testing.assert_array_equal(one.seen.tokens.numpy(), tokens.numpy())
    with pytest.raises(UserError, match="3 usable pictures, beside those that made the calibration's start"):
        find_keep(
            examination(model),
            open_source("scenes", limit=6, seed=0),
            0.9,
            [mark_of(i) for i in pictures("scenes", at_least=6, limit=6, seed=0)[:3]],
        )


@pytest.mark.parametrize("agreement", [0.0, 1.01, -1.0])
def test_an_agreement_out_of_range_is_refused(model: Model, agreement: float) -> None:
    with pytest.raises(UserError, match="above 0 and up to 1"):
        wants_search("auto", "leverage", Wish(agreement))


def test_options_of_the_search_belong_to_it() -> None:
    assert wants_search(" AUTO ", "leverage", Wish(0.9, "scenes"))
    assert not wants_search("32", "leverage", Wish())
    with pytest.raises(UserError, match="--agreement, --question belongs to --keep auto, not to --keep 32"):
        wants_search("32", "leverage", Wish(0.9, questions=("What?",)))
    with pytest.raises(UserError, match="keeps all tokens"):
        wants_search("auto", "none", Wish())


def export(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["export", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_bundle_holds_the_curve_and_the_summary_what_it_saves(tiny_llava: Path, tmp_path: Path) -> None:
    code, output = export(
        tiny_llava, "--keep", "auto", "--agreement", 0.3, "--images", "scenes", "--pictures", 4, "--rank", 3,
        "--max-new-tokens", 1, "--target", "jetson-orin", "--decoder-engine", "none", "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 0, output
    opened = open_bundle(tmp_path / "b")
    info = opened.manifest.calibration
    assert info is not None and info.keep is not None and info.start is None and info.record is None
    curve = read_keep_curve(opened.file(info.keep))
    assert curve.keep == opened.manifest.vision.keep < 9 and curve.chosen.agreement >= 0.3
    assert all(point.agreement >= 0.3 for point in curve.points if point.keep >= curve.keep)
    assert curve.positions == opened.manifest.positions and curve.written_by["torch"]
    assert curve.saving == saving_of(curve, Checkpoint(tiny_llava), TARGETS["jetson-orin"])
    assert curve.saving is not None and curve.saving.seconds[0] <= curve.saving.seconds[1]
    text = load_model(str(tiny_llava)).text
    assert curve.saving.cache == [2 * text.cache_row * (k + curve.prompt_tokens) for k in (curve.keep, 9)]
    assert "searching K in 1, 2, 3, 4, 6, 8" in output and f"K = {curve.keep}" in output
    assert [point.keep for point in curve.graph][-1] == curve.keep and curve.graph[-1].agreement >= 0.3
    assert curve.precision == "fp32" and curve.bundle is not None and curve.decoder == "fp32"
    assert curve.bundle.agreement == curve.graph[-1].agreement == curve.chosen.agreement
    for words in ("agreement  ", "exported  ", "GFLOP", "KV cache", "an estimate"):
        assert words in output
    (tmp_path / "keep.json").write_text(json.dumps(json.loads(curve.to_json()) | {"keep": 5}))
    with pytest.raises(BundleError, match="do not fit"):
        read_keep_curve(tmp_path / "keep.json")


def test_no_agreement_leaves_no_bundle(tiny_llava: Path, tmp_path: Path) -> None:
    """Random weights answer at random: nothing agrees but all the tokens."""
    code, output = export(
        tiny_llava, "--keep", "auto", "--agreement", 1.0, "--images", "scenes", "--pictures", 4, "--rank", 3,
        "--target", "cpu", "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 2 and "no K below 9 reaches an agreement of 1" in output and "--select none" in output, output
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_search_are_one_sentence(tiny_llava: Path, tmp_path: Path) -> None:
    common = ["--target", "cpu", "--rank", 3, "--out", tmp_path / "b"]
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = export(tiny_llava, "--keep", "auto", "--images", empty, *common)
    assert code == 2 and "holds no pictures" in output
    (empty / "questions.jsonl").write_text("\n")
    code, output = export(tiny_llava, "--keep", "auto", "--images", empty, *common)
    assert code == 2 and "holds no questions" in output
    code, output = export(tiny_llava, "--keep", "4", "--images", "scenes", *common)
    assert code == 2 and "--images belongs to --keep auto" in output
    code, output = export(tiny_llava, "--keep", "auto", "--agreement", "1.2", *common)
    assert code == 2 and "--agreement" in output
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    code, output = export(tiny_llava, "--keep", "auto", *common)  # before the search, not after
    assert code == 2 and "exists already" in output and "searching" not in output


def test_broken_pictures_are_counted_and_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(pictures("scenes", at_least=4, limit=4, seed=0)):
        image.save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no")
    arguments = [tiny_llava, "--keep", "auto", "--agreement", 0.01, "--rank", 3, "--images", folder, "--target", "cpu"]
    code, output = export(*arguments, "--out", tmp_path / "b")
    assert code == 2 and "3 usable pictures" in output and "3.png" in output, output
    images = pictures("scenes", at_least=5, limit=5, seed=0)
    images[4].save(folder / "4.png")
    arguments += ["--max-new-tokens", 1, "--question", "What color is it?"]
    code, output = export(*arguments, "--out", tmp_path / "b")
    assert code == 0 and "1 could not be used: 3.png" in output, output
    curve = read_keep_curve(tmp_path / "b" / "calibration" / "keep.json")
    assert curve.source.questions == 4 and curve.unpruned_accuracy is None and curve.chosen.accuracy is None
