"""The page that an export puts into the bundle: what it measures and counts, and that it never spoils an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page, check
from PIL import Image

from svdprune.exporter import export as exporter
from svdprune.exporter import report as reporting
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.export import ExportRequest, ExportSummary, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import golden_case, load_reference
from svdprune.exporter.licence import weights_licence
from svdprune.exporter.processor import image_values
from svdprune.exporter.report import SAMPLES, Samples, energy_curves, prepare_report, take_samples, write_report
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.report import FACTS, PAGE
from svdprune.runtime.report.facts import read_facts
from svdprune.runtime.verify_golden import read_golden
from tests.exporter.tiled_models import save_next


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures and a broken one."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BILINEAR).save(place / f"mine-{number}.png")
    (place / "broken.png").write_bytes(b"no picture")
    return place


@pytest.fixture(scope="module")
def summary(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportSummary:
    """Exported for a Jetson, with decoders for ONNX Runtime and for engines."""
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export_model(ExportRequest(str(tiny_llava), "4", "jetson-thor", out, rank=4, cache=200))


def page_of(bundle: Path) -> Page:
    return check((bundle / PAGE).read_text(encoding="utf-8"))


def test_a_bundle_has_its_page(summary: ExportSummary) -> None:
    opened = open_bundle(summary.bundle)  # every hash
    assert {PAGE, FACTS} <= set(opened.manifest.files) and summary.report == PAGE
    page = page_of(summary.bundle)
    for name in opened.manifest.files:
        assert name == PAGE or name in page.section("files").text
    assert "svdprune build" in page.section("engines").text


def test_the_energy_is_that_of_the_scored_features(tiny_llava: Path, summary: ExportSummary) -> None:
    facts = read_facts(open_bundle(summary.bundle))
    assert [(one.centre, one.pictures, len(one.curve)) for one in facts.energy] == [(False, 1, 9), (True, 1, 9)]
    checkpoint = Checkpoint(tiny_llava)
    family = family_of(checkpoint.config, "tiny")
    images = ImageSettings.from_json(image_values(checkpoint))
    model = load_reference(checkpoint, lambda note: None)
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(normalise(preprocess(golden_case()[0], images), images))[None]
        features = family.reference_tokens(model, pixels)[0][0].double().numpy()
    for one in facts.energy:
        x = features - features.mean(axis=0) if one.centre else features
        squares = np.linalg.svd(x, compute_uv=False) ** 2
        np.testing.assert_allclose(one.curve, np.cumsum(squares) / squares.sum(), atol=2e-6)


def test_stages_are_measured_and_the_target_is_modelled(summary: ExportSummary) -> None:
    facts = read_facts(open_bundle(summary.bundle))
    assert facts.measured is not None and facts.measured_note is None
    assert (facts.measured.pruned.tokens, facts.measured.unpruned.tokens) == (4, 9)
    assert facts.measured.where.kind == "CPU" and facts.measured.target == "jetson-thor"
    guess = facts.estimate
    assert guess is not None and "not a measurement" in guess.kind and guess.target == "jetson-thor"
    assert (guess.pruned.tokens, guess.unpruned.tokens, guess.decoder_precision) == (4, 9, "fp16")
    assert 0 < guess.pruned.memory["KV cache of the rows in use"] < guess.unpruned.memory["KV cache of the rows in use"]
    assert sum(guess.pruned.memory[part] for part in list(guess.pruned.memory)[:4]) == guess.pruned.total
    assert {line.target for line in facts.elsewhere} >= {"jetson-orin", "h100"}
    assert "jetson-thor" not in {line.target for line in facts.elsewhere}
    text = page_of(summary.bundle).section("times").text
    assert "CPU figures" in text and "not on the target" in text


def test_a_cpu_has_work_and_no_modelled_times(tiny_llava: Path, tmp_path: Path) -> None:
    export_model(ExportRequest(str(tiny_llava), "4", out=tmp_path / "b", rank=4))
    facts = read_facts(open_bundle(tmp_path / "b"))
    assert facts.estimate is not None and facts.estimate.pruned.first_token is None
    assert all(stage.seconds is None for stage in facts.estimate.pruned.stages)
    assert "no fixed peaks" in page_of(tmp_path / "b").section("estimate").text


@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_a_picture_in_tiles_has_its_views(tmp_path: Path, budget: str) -> None:
    save_next(tmp_path / "model")
    out = tmp_path / "b"
    export_model(ExportRequest(str(tmp_path / "model"), "4", out=out, rank=4, budget=budget))  # type: ignore[arg-type]
    opened = open_bundle(out)
    facts, golden = read_facts(opened), read_golden(opened)
    page = page_of(out)
    shown = page.section("kept").text
    assert len(page.pictures()) == 4 and f"{len(golden.kept)} of {len(golden.scores)} vision tokens kept, in 2" in shown
    assert facts.measured is not None and facts.measured.unpruned is not None, facts.measured_note
    assert facts.measured.unpruned.prompt > facts.measured.pruned.prompt
    tokens, channels = opened.manifest.vision.tokens, opened.manifest.vision.channels
    assert 1 < len(facts.energy[0].curve) <= min(tokens, channels) and facts.energy[0].curve[-1] == 1.0
    assert facts.estimate is not None or facts.estimate_note


def test_without_a_report(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare_report", "write_report"):
        monkeypatch.setattr(exporter, name, None)
    summary = export_model(ExportRequest(str(tiny_llava), "4", out=tmp_path / "b", rank=4, report=False))
    assert summary.report is None
    assert not {PAGE, FACTS} & set(open_bundle(tmp_path / "b").manifest.files)


@pytest.fixture
def unfinished(summary: ExportSummary, tiny_llava: Path, folder: Path, tmp_path: Path):
    """Write the page of a copy of the bundle with the user's pictures, and read its facts."""

    def write() -> tuple[Page, dict[str, object]]:
        import shutil

        place = tmp_path / "copy"
        shutil.copytree(summary.bundle, place)
        shutil.rmtree(place / "report")
        (place / PAGE).unlink()
        manifest = dataclasses.replace(open_bundle(summary.bundle).manifest, files={})
        (place / "manifest.json").unlink()
        checkpoint = Checkpoint(tiny_llava)
        family = family_of(checkpoint.config, "tiny")
        images = ImageSettings.from_json(image_values(checkpoint))
        model = load_reference(checkpoint, lambda note: None)
        prepared = prepare_report(model, family, family.describe(checkpoint), images, [None, str(folder)], None, 0)
        write_report(place, manifest, checkpoint, prepared)
        return page_of(place), json.loads((place / FACTS).read_text())

    return write


def test_the_users_pictures_are_shown_and_asked_about(unfinished, folder: Path) -> None:
    page, facts = unfinished()
    assert len(facts["pictures"]) == SAMPLES and len(page.pictures()) == 2 + 2 * SAMPLES
    assert all(one["name"].startswith("mine-") and one["question"] and one["answer"] for one in facts["pictures"])
    assert facts["energy"][0]["pictures"] == 1 + SAMPLES and str(folder) in page.section("energy").text


def test_a_model_too_large_to_try_is_only_looked_at(unfinished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "QUICK_BYTES", 0)
    monkeypatch.setattr(reporting, "open_decoder", None)
    page, facts = unfinished()
    assert facts["measured"] is None and "which an export does not load" in page.section("times").text
    assert len(facts["pictures"]) == SAMPLES and all(one["answer"] is None for one in facts["pictures"])


def test_a_graph_that_does_not_run_here_is_a_note(unfinished, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BundleError("no kernel for <fp8> here")

    monkeypatch.setattr(reporting, "open_vision", refuse)
    page, _ = unfinished()
    assert "no kernel for <fp8> here" in page.section("times").text
    assert "are not shown: no kernel for <fp8> here" in page.section("kept").text
    assert len(page.pictures()) == 2  # the golden one needs no run


def test_an_unknown_model_has_no_estimate(unfinished, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdprune.exporter import report_estimate

    def unknown(place: str) -> None:
        raise BundleError("the language model is of type 'new'")

    monkeypatch.setattr(report_estimate, "load_model", unknown)
    page, facts = unfinished()
    assert facts["estimate"] is None and "of type 'new'" in page.section("estimate").text


def test_pictures_that_are_gone_are_a_note(tmp_path: Path) -> None:
    found = take_samples([None, str(tmp_path / "gone")], None, 0)
    assert found.samples == () and found.note is not None and "are not shown" in found.note
    assert take_samples([None, None], None, 0) == Samples()


def test_a_sample_with_odd_features_has_no_curve(tiny_llava: Path, folder: Path, monkeypatch) -> None:
    checkpoint = Checkpoint(tiny_llava)
    family = family_of(checkpoint.config, "tiny")
    images = ImageSettings.from_json(image_values(checkpoint))
    rows = iter([np.eye(9, 32), np.full((9, 32), np.nan), np.eye(9, 32), np.eye(9, 32)])
    monkeypatch.setattr(reporting, "_scored", lambda *arguments: next(rows))
    samples = take_samples([str(folder)], None, 0)
    spec = family.describe(checkpoint)
    found = energy_curves(None, family, spec, images, golden_case()[0], samples)
    assert found[0].pictures == SAMPLES and np.isfinite(found[0].curve).all()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# card"}, "apache-2.0 (the model card)"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: llama2\nlicense_link: 'https://x.y/z'\n---\n"},
            "llama2 (the model card), https://x.y/z",
        ),
        ({"README.md": "---\nlicense: other\n---\n", "LICENSE": "\n\n Some Licence 2.0\nmore"},
         "Some Licence 2.0 (the file LICENSE)"),
        ({"README.md": "# no head\nlicense: mit"}, None),
        ({"LICENCE.txt": ""}, "unnamed (the file LICENCE.txt)"),
        ({}, None),
    ],
)  # fmt: skip
def test_the_licence_of_the_weights(tmp_path: Path, files: dict[str, str], said: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert weights_licence(tmp_path) == said
