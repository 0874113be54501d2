"""`svdprune calibrate`: what a calibration of a tiny checkpoint says, held to the parts computed outright."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from svdprune.calib.calibration import Calibration, Candidate, digest
from svdprune.calib.calibration_files import read_calibration, write_calibration
from svdprune.calib.sources import open_source, pictures
from svdprune.calib.spectrum import Spectrum
from svdprune.calib.start import calibrated_start
from svdprune.exporter.calibrate.answers import better
from svdprune.exporter.calibrate.fidelity import Exact, block_widths
from svdprune.exporter.calibrate.look import ROLES, START, other_taps
from svdprune.exporter.calibrate.run import Request, calibrate, remarks
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.contenders import parse_contenders
from svdprune.exporter.evaluate.model import Eyes, Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.exporter.selection import SelectorConfig
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import UserError

PICTURES, LIMIT = 16, 4


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Model:
    return Model(Checkpoint(tiny_llava), "tiny")


@pytest.fixture(scope="module")
def calibrated(model: Model) -> tuple[Calibration, dict[str, np.ndarray]]:
    source = open_source("scenes", limit=PICTURES, seed=0)
    return calibrate(model, "tiny", None, source, Request((4,), variance=0.8, at_least=8, limit=LIMIT))


def starting(eyes: Eyes) -> list[np.ndarray]:
    """Features of the pictures that made the start."""
    seen = pictures("scenes", at_least=PICTURES, limit=PICTURES, seed=0)
    return [eyes.see(image).matrices()[0] for n, image in enumerate(seen) if ROLES[n % len(ROLES)] == START]


def test_the_start_and_the_curves_are_of_their_own_pictures_alone(
    calibrated: tuple[Calibration, dict[str, np.ndarray]], model: Model
) -> None:
    found, arrays = calibrated
    features = starting(model)
    counts = found.pictures
    assert (counts.start, counts.choice, counts.judgement) == (8, 4, 4) and len(features) == 8
    for name, centre in (("start", False), ("start_centred", True)):
        expected = calibrated_start(features, arrays[name].shape[1], centre)
        np.testing.assert_allclose(arrays[name], expected, atol=1e-5)
        spectrum = Spectrum(centre)
        for picture in features:
            spectrum.add(picture)
        curve = arrays[f"energy/-2/{'centred' if centre else 'raw'}"]
        np.testing.assert_allclose(curve, spectrum.curve, atol=1e-9)
        (row,) = [one for one in found.energy if one.tap == "-2" and one.centre == centre]
        assert row.ranks["0.8"] == spectrum.rank(0.8) and row.ranks["0.99"] == spectrum.rank(0.99)
        assert (row.lowest, row.highest) == (min(spectrum.ranks(0.8)), max(spectrum.ranks(0.8)))
    assert {one.tap for one in found.energy} == {"-2", "-1", "projected"}
    seen = pictures("scenes", at_least=PICTURES, limit=PICTURES, seed=0)
    marks = [digest(np.asarray(image)) for image in seen]
    assert counts.start_digests == [mark for n, mark in enumerate(marks) if ROLES[n % len(ROLES)] == START]


def test_the_settings_are_the_first_that_reach_the_overlap(
    calibrated: tuple[Calibration, dict[str, np.ndarray]], model: Model
) -> None:
    found, arrays = calibrated
    assert found.met and found.trials[-1].overlap >= 0.99
    assert all(trial.overlap < 0.99 for trial in found.trials[:-1])
    order = [(trial.iterations, trial.block) for trial in found.trials]
    blocks = block_widths(found.settings.rank, 9)
    assert order == [(n, b) for n in range(1, 7) for b in blocks][: len(order)]
    assert (found.settings.iterations, found.settings.block) == order[-1]
    (row,) = [one for one in found.energy if one.tap == "-2" and one.centre == found.settings.centre]
    assert found.settings.rank == row.ranks["0.8"]
    seen = pictures("scenes", at_least=PICTURES, limit=PICTURES, seed=0)
    judged = [model.see(image).matrices()[0] for n, image in enumerate(seen) if n % len(ROLES) == 3]
    settings = found.settings
    config = SelectorConfig(
        rank=settings.rank, block=settings.block, iterations=settings.iterations, centre=settings.centre
    )
    start = arrays["start_centred" if settings.centre else "start"]
    assert Exact.of(judged, config, [4], model.spec).trial(config, start) == found.judged[0]
    assert [trial.start for trial in found.judged] == ["calibrated", "calibrated", "seeded"]


def test_the_answers_are_those_of_an_evaluation(
    calibrated: tuple[Calibration, dict[str, np.ndarray]], model: Model, tmp_path: Path
) -> None:
    """The same labels evaluated on the same pictures: exact scores and the graph's agree at these sizes."""
    found, _ = calibrated
    source = open_source("scenes", limit=PICTURES, seed=0)
    names = [one.label for one in found.candidates]
    assert names[-2:] == ["random", "grid"] and len(names) == 8
    assert len({one.label for one in found.candidates}) == 8
    chosen = [sample for n, sample in enumerate(source.samples()) if n % len(ROLES) == 1]
    lines = []
    for sample in chosen:
        sample.image.save(tmp_path / f"{sample.name.replace(':', '-')}.png")
        for question in sample.questions:
            line = {"image": f"{sample.name.replace(':', '-')}.png", "question": question.text}
            lines.append(json.dumps(line))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    again = open_source(str(tmp_path), limit=99, seed=0)
    report = evaluate_model(model, "tiny", again, parse_contenders(names), [4], ["compact"], limit=LIMIT)
    for mine, row in zip(found.candidates, report.rows[1:], strict=True):
        assert row.agreement is not None and row.kl is not None
        assert (mine.label, mine.questions) == (row.selector, row.questions)
        assert mine.agreement == pytest.approx(row.agreement.value)
        assert mine.kl == pytest.approx(row.kl.value, abs=1e-4)
        assert mine.matched == pytest.approx(row.matched)


def candidate(agreement: float, difference: list[float] | None) -> Candidate:
    return Candidate("x", 4, 10, agreement, 0, 1, agreement, 0.1, "-2", False, 3, difference)


def test_only_what_is_surely_better_replaces_the_default() -> None:
    first = candidate(0.5, None)
    chance, sure, surer = (
        candidate(0.9, [0.4, -0.01, 0.8]),
        candidate(0.7, [0.2, 0.1, 0.3]),
        candidate(0.8, [0.3, 0.1, 0.4]),
    )
    assert better([first]) is first and better([first, chance]) is first
    assert better([first, candidate(0.9, None)]) is first  # too few pictures to say
    assert better([first, chance, sure, surer]) is surer


def test_without_the_language_model_nothing_is_said_about_answers(tiny_llava: Path) -> None:
    eyes = Eyes(Checkpoint(tiny_llava), "tiny")
    source = open_source("scenes", limit=8, seed=0)
    found, _ = calibrate(eyes, "tiny", None, source, Request((4, 2), rank=3, centre=True, at_least=8))
    assert found.candidates == [] and "was not asked" in found.criterion and found.best_tap == "-2"
    assert found.settings.centre and found.settings.rank == 3 and found.wished.keep == [4, 2]


def test_the_same_seed_gives_the_same_calibration(tiny_llava: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        source = open_source("scenes", limit=8, seed=3)
        request = Request((4,), rank=3, at_least=8)
        write_calibration(*calibrate(Eyes(Checkpoint(tiny_llava), "t"), "t", None, source, request), tmp_path / name)
        files.append((tmp_path / name / "calibration.json").read_bytes())
    assert files[0] == files[1]


def test_what_was_not_reached_is_said(calibrated: tuple[Calibration, dict[str, np.ndarray]], model: Model) -> None:
    source = open_source("scenes", limit=8, seed=0)
    eyes = Eyes(model.checkpoint, "tiny")
    found, _ = calibrate(eyes, "tiny", None, source, Request((4,), rank=1, at_least=8))
    short = dataclasses.replace(found, met=False)
    assert "no setting reached an overlap" in remarks(short)[0]
    below = dataclasses.replace(found, met=True, judged=[dataclasses.replace(found.judged[0], overlap=0.5)])
    assert "below the wished 0.99" in remarks(below)[0]
    tap = dataclasses.replace(calibrated[0], best_tap="projected")
    assert any("leverage:tap=projected" in remark for remark in remarks(tap))
    for difference, words in (
        ([0.2, 0.1, 0.3], "--select grid"),
        ([0.1, -0.1, 0.3], "is not told apart"),
        ([-0.2, -0.3, -0.1], ""),
    ):
        chance = dataclasses.replace(candidate(0.9, difference), tap=None, label="grid")
        said = [one for one in remarks(dataclasses.replace(found, candidates=[chance])) if "`grid`" in one]
        assert len(said) == bool(words) and all(words in one for one in said)


def test_taps_are_the_last_two_states_beside_the_own(tiny_llava: Path) -> None:
    eyes = Eyes(Checkpoint(tiny_llava), "tiny")
    assert other_taps(eyes) == [-1]
    for tap, others in ((-1, [-2]), (3, [-2]), (2, [-1]), (1, [-2, -1])):
        checkpoint = Checkpoint(tiny_llava)
        checkpoint.config["vision_feature_layer"] = tap
        assert other_taps(Eyes(checkpoint, "tiny")) == others


def test_blocks_rise_from_the_rank_to_the_limit() -> None:
    assert block_widths(3, 9) == [3, 8, 9] and block_widths(9, 9) == [9]
    assert block_widths(16, 576) == [16, 24, 32, 48, 64, 96]


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["calibrate", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_writes_the_folder_and_the_tables(tiny_llava: Path, tmp_path: Path) -> None:
    code, output = run(
        tiny_llava, "--images", "scenes", "--limit", 8, "--at-least", 8, "--keep", "4,20%", "--rank", 2,
        "--max-new-tokens", 2, "--out", tmp_path / "c",
    )  # fmt: skip
    assert code == 0, output
    for words in ("directions that hold", "iterations 1, block 2", "leverage:rank=2:centre", "random", "--calibration"):
        assert words in output, output
    found, _ = read_calibration(tmp_path / "c")
    assert found.wished.keep == [4, 2] and found.written_by["torch"] and found.model.sha256


def test_the_command_prints_json_alone_on_stdout(tiny_llava: Path, tmp_path: Path) -> None:
    arguments = ["--images", "scenes", "--limit", "4", "--at-least", "4", "--keep", "4", "--rank", "2", "--no-answers"]
    result = CliRunner().invoke(
        group, ["calibrate", str(tiny_llava), *arguments, "--out", str(tmp_path / "c"), "--json"]
    )
    content = json.loads(result.stdout)
    assert content["settings"]["rank"] == 2 and content["calibration"] == str(tmp_path / "c")


def test_a_checkpoint_without_a_language_model_is_calibrated_by_its_features(tiny_llava: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    eyes_only = tmp_path / "eyes"
    shutil.copytree(tiny_llava, eyes_only)
    kept = {
        name: tensor
        for name, tensor in load_file(eyes_only / "model.safetensors").items()
        if "language_model" not in name and "lm_head" not in name
    }
    assert kept
    save_file(kept, eyes_only / "model.safetensors")
    code, output = run(
        eyes_only,
        "--images",
        "scenes",
        "--limit",
        4,
        "--at-least",
        4,
        "--keep",
        4,
        "--rank",
        2,
        "--out",
        tmp_path / "c",
    )
    assert code == 0 and "has no language model, so no answers are compared" in output, output
    assert read_calibration(tmp_path / "c")[0].candidates == []


def folder_of(tmp_path: Path, count: int) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(pictures("scenes", at_least=count, limit=count, seed=0)):
        image.save(folder / f"{number}.png")
    return folder


def test_too_few_broken_and_copied_pictures_are_counted_and_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    common = ["--keep", 4, "--rank", 2, "--no-answers", "--out", tmp_path / "c"]
    code, output = run(tiny_llava, "--images", folder, "--at-least", 5, *common)
    assert code == 2 and "has 4 pictures and 5 are needed" in output
    (folder / "broken.png").write_bytes(b"not a picture")
    code, output = run(tiny_llava, "--images", folder, "--at-least", 5, *common)
    assert code == 2 and "4 usable pictures of 5" in output and "broken.png" in output
    shutil.copy(folder / "0.png", folder / "copy.png")
    code, output = run(tiny_llava, "--images", folder, "--at-least", 5, *common)
    assert code == 2 and "has 4 different usable pictures and 5 are needed (1 are copies" in output
    assert not (tmp_path / "c").exists()
    code, output = run(tiny_llava, "--images", folder, "--at-least", 4, *common)
    assert code == 0 and "1 could not be used: broken.png" in output and "1 copies left out" in output
    found, _ = read_calibration(tmp_path / "c")
    assert found.pictures.duplicates == 1 and found.pictures.broken[0].startswith("broken.png: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "nowhere"], "no source of that name"),
        (["--images", "scenes", "--rank", "3", "--variance", "0.9"], "exclude each other"),
        (["--images", "scenes", "--rank", "10"], "rank 10 is more than the 9 directions"),
        (["--images", "scenes", "--keep", "9"], "every setting keeps the same"),
        (["--images", "scenes", "--keep", "32"], "the picture has 9"),
        (["--images", "scenes", "--keep", ","], "Give a count"),
        (["--images", "scenes", "--at-least", "20"], "--at-least 20 is more than --limit 8"),
        (["--images", "scenes", "--device", "cuda:9"], "torch cannot use cuda:9"),
        (["--images", "scenes", "--out", "gone/c"], "there is no folder"),
        (["--images", "scenes", "--overlap", "1.5"], "--overlap"),
        (["--images", "scenes", "--variance", "0"], "--variance"),
        ([], "--images"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llava: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    defaults = {"--limit": "8", "--at-least": "4", "--keep": "4", "--out": str(tmp_path / "c")}
    filled = [word for pair in defaults.items() if pair[0] not in arguments for word in pair]
    code, output = run(tiny_llava, "--no-answers", *filled, *arguments)
    assert code == 2 and said in output, output
    assert not (tmp_path / "c").exists()


def test_a_wrong_model_is_refused(tmp_path: Path) -> None:
    code, output = run("minillava", "--images", "scenes", "--out", tmp_path / "c")
    assert code == 2 and "did you mean mini-llava" in output


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(()), "Give a count"),
        (Request((4,), rank=2, variance=0.9), "not both"),
        (Request((4,), variance=1.5), "above 0 and up to 1"),
        (Request((4,), overlap=0.0), "wished overlap"),
    ],
)
def test_a_request_that_cannot_be_is_refused(tiny_llava: Path, request_: Request, said: str) -> None:
    with pytest.raises(UserError, match=said):
        request_.check(Eyes(Checkpoint(tiny_llava), "tiny"))
