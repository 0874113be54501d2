"""Export with a calibration: the settings are taken over, the graph is the calibrated selector, others are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from svdprune.calib.calibration import Calibration, Settings
from svdprune.calib.calibration_files import read_calibration, write_calibration
from svdprune.calib.sources import open_source, pictures
from svdprune.exporter.calibrate.apply import bundle_start, choose_selector
from svdprune.exporter.calibrate.run import Request, calibrate
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.model import Eyes
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.verify import verify
from tools.parity import Reference, measure, questions

SETTINGS = Settings(rank=3, block=4, iterations=1, centre=True)


@pytest.fixture(scope="module")
def eyes(tiny_llava: Path) -> Eyes:
    return Eyes(Checkpoint(tiny_llava), "tiny")


@pytest.fixture(scope="module")
def folder(eyes: Eyes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration whose settings are none of the defaults."""
    out = tmp_path_factory.mktemp("calibration") / "c"
    source = open_source("scenes", limit=8, seed=0)
    record, arrays = calibrate(eyes, "tiny", None, source, Request((4,), rank=3, centre=True, at_least=8))
    write_calibration(dataclasses.replace(record, settings=SETTINGS), arrays, out)
    return out


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    export_model(ExportRequest(str(tiny_llava), "4", out=out, select="leverage", calibration=folder))
    return out


def test_the_bundle_holds_the_calibration_and_says_so(bundle: Path, folder: Path) -> None:
    opened = open_bundle(bundle)
    selector, info = opened.manifest.vision.selector, opened.manifest.calibration
    assert (selector.rank, selector.block, selector.iterations, selector.centre) == (3, 4, 1, True)
    assert selector.start == "calibrated" and selector.seed is None
    assert info is not None and info.keep is None
    assert read_calibration(bundle / "calibration")[0] == read_calibration(folder)[0]
    start = bundle_start(opened)
    assert start is not None
    np.testing.assert_array_equal(start, read_calibration(folder)[1]["start_centred"][:, :4])
    assert {info.record, info.arrays, info.start} <= set(opened.manifest.files)


def test_the_graph_is_the_calibrated_selector(bundle: Path, eyes: Eyes) -> None:
    vlm = load(bundle)
    calibrated = SelectorConfig(rank=3, block=4, iterations=1, centre=True)
    scorers = [build_selector(calibrated, 9, 32, start=start) for start in (bundle_start(open_bundle(bundle)), None)]
    differing = 0
    for image in pictures("scenes", at_least=6, limit=6, seed=5):
        sight = vlm.see(image)
        tokens = eyes.see(image).tokens
        ours, seeded = (scorer(tokens)[0].numpy() for scorer in scorers)
        np.testing.assert_array_equal(sight.kept_indices, keep_indices(ours, 4))
        np.testing.assert_allclose(sight.scores, ours, atol=1e-4)
        differing += not np.allclose(ours, seeded, atol=1e-3)
    assert differing  # the start is not without effect: one iteration of a narrow block


def test_verify_and_parity_take_such_a_bundle(bundle: Path, tiny_llava: Path) -> None:
    assert verify(bundle).passed
    vlm = load(bundle)
    with torch.no_grad():
        vision, tallies = measure(vlm, Reference(tiny_llava, vlm), questions(2, "calibrated"), 4)
    assert min(vision.overlap) == 1.0 and min(vision.cosine) > 0.9999
    assert not any(tally.different for tally in tallies.values())


def test_a_bundle_that_lost_its_start_is_refused(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    (broken / "calibration" / "start.npy").unlink()
    with pytest.raises(BundleError, match=r"lacks its file calibration/start\.npy"):
        open_bundle(broken)
    shutil.copytree(bundle, broken, dirs_exist_ok=True)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["calibration"] = None
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="names no file of the calibrated start"):
        bundle_start(open_bundle(broken))


def chosen(eyes: Eyes, folder: Path, **given: Any) -> tuple[SelectorConfig, list[str], int]:
    found = choose_selector("leverage", given, 0, folder, eyes.checkpoint, eyes.spec)
    assert found.start is not None
    return found.config, found.notes, found.start.shape[1]


def test_what_is_given_wins_and_is_said(eyes: Eyes, folder: Path) -> None:
    config, notes, columns = chosen(eyes, folder)
    assert (config.rank, config.block, config.rounds, config.centre) == (3, 4, 1, True)
    assert notes == [] and columns == 4
    config, notes, columns = chosen(eyes, folder, iterations=2, block=6)
    assert (config.block, config.rounds, columns) == (6, 2, 6)
    assert notes == ["--iterations 2 instead of the calibration's 1", "--block 6 instead of the calibration's 4"]
    config, notes, columns = chosen(eyes, folder, rank=2)
    default = SelectorConfig(rank=2, centre=True)
    assert (config.block, config.rounds, columns) == (None, default.rounds, default.columns(9, 32))
    assert "--rank 2 instead of the calibration's 3" in notes and "block and iterations are the defaults" in notes[1]
    config, notes, _ = chosen(eyes, folder, centre=False)
    assert not config.centre and "--no-centre instead of the calibration's centred features" in notes
    config, notes, _ = chosen(eyes, folder, variance=0.9)
    assert config.variance == 0.9 and config.block is None
    assert "--variance 0.9 instead of the calibration's rank 3" in notes
    assert chosen(eyes, folder, rank=3, block=4, iterations=1, centre=True)[1] == []  # the same is nothing else


def test_the_start_fits_the_centring(eyes: Eyes, folder: Path) -> None:
    arrays = read_calibration(folder)[1]
    for centre, name in ((False, "start"), (True, "start_centred")):
        found = choose_selector("leverage", {"centre": centre}, 0, folder, eyes.checkpoint, eyes.spec)
        assert found.start is not None
        np.testing.assert_array_equal(found.start, arrays[name][:, : found.start.shape[1]])


def rewritten(folder: Path, out: Path, **changes: Any) -> Path:
    record, arrays = read_calibration(folder)
    write_calibration(dataclasses.replace(record, **changes), arrays, out)
    return out


def test_a_calibration_of_something_else_is_refused(eyes: Eyes, folder: Path, tmp_path: Path) -> None:
    record: Calibration = read_calibration(folder)[0]
    for number, (changes, said) in enumerate(
        (
            ({"model": dataclasses.replace(record.model, sha256="0" * 64)}, "with other weights or another config"),
            ({"features": dataclasses.replace(record.features, tap=-1)}, "for tap -1 and this model has -2"),
            (
                {"features": dataclasses.replace(record.features, tokens=16, grid=[4, 4])},
                r"for grid \(4, 4\) and this model has \(3, 3\)",
            ),
        )
    ):
        other = rewritten(folder, tmp_path / str(number), **changes)
        with pytest.raises(UserError, match=said):
            choose_selector("leverage", {}, 0, other, eyes.checkpoint, eyes.spec)
    with pytest.raises(UserError, match="is of leverage scores, which the selector grid"):
        choose_selector("grid", {}, 0, folder, eyes.checkpoint, eyes.spec)
    with pytest.raises(UserError, match=r"has no calibration\.json"):
        choose_selector("leverage", {}, 0, tmp_path, eyes.checkpoint, eyes.spec)
    narrow = tmp_path / "narrow"
    held = {name: np.eye(32, 4, dtype=np.float32) for name in ("start", "start_centred")}
    write_calibration(record, held, narrow)
    with pytest.raises(UserError, match="a start of 4 columns and a block of 6 was asked for"):
        choose_selector("leverage", {"block": 6}, 0, narrow, eyes.checkpoint, eyes.spec)


def export(*arguments: object) -> tuple[int, str]:
    words = ["export", *map(str, arguments), "--target", "cpu"]
    result = CliRunner().invoke(group, words, catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_says_what_it_took(tiny_llava: Path, folder: Path, tmp_path: Path) -> None:
    code, output = export(tiny_llava, "--keep", 4, "--calibration", folder, "--block", 5, "--out", tmp_path / "b")
    assert code == 0, output
    assert "rank 3, block 5, iterations 1, centred, calibrated start" in output
    assert "--block 5 instead of the calibration's 4" in output


def test_a_truncated_calibration_leaves_no_bundle(tiny_llava: Path, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "c"
    shutil.copytree(folder, broken)
    text = (broken / "calibration.json").read_text()
    (broken / "calibration.json").write_text(text[:200])
    code, output = export(tiny_llava, "--keep", 4, "--calibration", broken, "--out", tmp_path / "b")
    assert code == 2 and "is not valid JSON" in output and "calibrate again" in output
    assert not (tmp_path / "b").exists()
