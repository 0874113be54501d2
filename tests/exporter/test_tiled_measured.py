"""Models that cut pictures into tiles: evaluated, calibrated, searched for K and quantised as those that do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from svdprune.calib.calibration_files import write_calibration
from svdprune.calib.evaluate.bundle import evaluate_bundle
from svdprune.calib.keep_curve import KeepPoint, read_keep_curve
from svdprune.calib.sources import open_source
from svdprune.exporter.calibrate.auto import Wish
from svdprune.exporter.calibrate.keep import Asked, Examination
from svdprune.exporter.calibrate.run import Request, calibrate
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.contenders import fitting, parse_contenders
from svdprune.exporter.evaluate.judge import Judge
from svdprune.exporter.evaluate.model import Eyes, Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.exporter.evaluate.seen import View
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.families import family_of
from svdprune.exporter.families.base import Budget
from svdprune.exporter.golden import load_reference, reference_answer
from svdprune.exporter.tiles import described
from svdprune.runtime import load
from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import Layout, picture_places
from svdprune.runtime.prompt import Pictured
from svdprune.runtime.verify import verify
from tests.exporter import gemma_models, qwen_models, shuffled_models, tiled_models
from tests.exporter.tiled_checks import SAVES, SIZES, picture, unpruned

LIMIT, KEEP = 3, 8


@pytest.fixture(scope="module", params=list(SAVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVES[name](tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def model_of(folder: Path, budget: Budget = "picture") -> Model:
    checkpoint = Checkpoint(folder)
    return Model(checkpoint, "tiny", spec=described(family_of(checkpoint.config, "tiny"), checkpoint, budget))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return model_of(folder)


@pytest.mark.parametrize("size", SIZES[:3], ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_unpruned_view_is_that_of_transformers(
    model: Model, reference: Any, folder: Path, name: str, size: tuple[int, int]
) -> None:
    image = picture(size)
    whole = model.whole(model.see(image))
    wanted = unpruned(reference, folder, name, image)
    assert whole.span.total == len(wanted)
    torch.testing.assert_close(whole.rows, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_an_evaluation_has_every_contender_that_can_be(folder: Path, budget: Budget) -> None:
    model = model_of(folder, budget)
    contenders = fitting(parse_contenders([]), model.spec)
    labels = {one.label for one in contenders}
    assert {"leverage", "leverage-dpp", "maxmin", "dpp", "norm", "random"} <= labels and "grid" not in labels
    assert ("cls" in labels) == model.spec.cls
    chosen = parse_contenders(["leverage:rank=4", "maxmin", "random", "leverage:rank=4:tap=projected"])
    source = open_source("scenes", limit=2, seed=0)
    keeps = [4, model.spec.tokens]
    report = evaluate_model(model, "tiny", source, chosen, keeps, ["compact", "original"], limit=LIMIT)
    for row in report.rows:
        assert row.agreement is not None and row.kl is not None
        if row.keep == model.spec.tokens and row.positions == "compact":  # everything is kept, whoever chooses
            assert row.agreement.value == 1.0 and row.kl.value == pytest.approx(0.0, abs=1e-5)
    assert report.facts["K"].startswith("of the whole picture" if budget == "picture" else "of each tile")
    with pytest.raises(UserError, match="fixed number of tokens"):
        evaluate_model(model, "tiny", source, parse_contenders(["grid"]), [4], ["compact"], limit=LIMIT)


@pytest.mark.parametrize("budget", ["picture", "tile"])
def test_a_calibration_is_of_the_tokens_that_the_graph_decomposes(folder: Path, budget: Budget) -> None:
    checkpoint = Checkpoint(folder)
    spec = described(family_of(checkpoint.config, "tiny"), checkpoint, budget)
    eyes = Eyes(checkpoint, "tiny", spec=spec)
    source = open_source("scenes", limit=8, seed=0)
    keep = 4
    found, arrays = calibrate(eyes, "tiny", None, source, Request((keep,), variance=0.8, at_least=8))
    assert (found.features.tokens, found.features.budget) == (spec.tokens, budget)
    assert found.met and found.judged[0].overlap > 0.7  # of 4 tokens
    assert (found.pictures.start, found.pictures.choice, found.pictures.judgement) == (4, 2, 2)
    seen = eyes.see(next(iter(source.samples())).image)
    matrices = seen.matrices()
    assert len(matrices) == (1 if budget == "picture" else len(seen.cut.pixels)) if seen.cut else False
    assert sum(map(len, matrices)) == seen.count
    assert arrays["start"].shape[0] == spec.channels


@pytest.fixture(scope="module")
def resampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose candidates have four sources each."""
    return tiled_models.save_onevision(tmp_path_factory.mktemp("resampled"))


@pytest.fixture(scope="module")
def bundle(resampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything at once: a calibration, K searched, 8 bits."""
    folder = resampled
    place = tmp_path_factory.mktemp("bundle")
    source = open_source("scenes", limit=8, seed=0)
    eyes = Eyes(Checkpoint(folder), "tiny")
    found, arrays = calibrate(eyes, "tiny", None, source, Request((KEEP,), rank=4, at_least=8))
    write_calibration(found, arrays, place / "calibration")
    wish = Wish(0.05, "scenes:other", 4, limit=1)
    export_model(
        ExportRequest(
            str(folder),
            "auto",
            "cpu",
            place / "bundle",
            select="leverage",
            calibration=place / "calibration",
            search=wish,
            precision="int8",
            calibration_images="scenes:third",
            sensitive="none",
            report=False,
        )
    )
    return place / "bundle"


def test_a_searched_calibrated_bundle_in_8_bits_holds(bundle: Path) -> None:
    assert verify(bundle).passed
    with load(bundle) as vlm:
        vision, info = vlm.manifest.vision, vlm.manifest.calibration
        assert vision.precision == "int8" and vision.quantisation is not None and vision.quantisation.overlap > 0.5
        assert vision.selector.start == "calibrated" and info is not None and info.keep is not None
        curve = read_keep_curve(vlm.bundle.file(info.keep))
        sight = vlm.see(picture((640, 480)))
        assert 0 < len(sight.kept_indices) <= vision.keep
    assert curve.keep == vision.keep and curve.tokens == vision.tokens and curve.precision == "int8"
    assert curve.graph[-1].keep == curve.keep and curve.graph[-1].agreement >= curve.wished
    assert curve.bundle is not None and curve.decoder == "fp32" and curve.unmeasured is None
    assert curve.bundle.agreement == pytest.approx(curve.graph[-1].agreement)  # the decoder is in float32
    assert curve.bundle.kl == pytest.approx(curve.graph[-1].kl, abs=1e-3)
    assert curve.rows[0] <= curve.rows[1] and curve.rows[0] >= min(curve.keep, curve.rows[1])


def test_a_bundle_is_measured_against_itself_without_pruning(bundle: Path) -> None:
    with load(bundle) as vlm:
        report = evaluate_bundle(vlm, open_source("scenes", limit=2, seed=0, labels=False), limit=LIMIT)
    whole, pruned = report.rows
    assert whole.agreement is not None and whole.agreement.value == 1.0
    assert pruned.agreement is not None and pruned.kl is not None and pruned.kl.value > 0


def test_k_is_raised_until_the_exported_graph_agrees(
    resampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selector in torch agrees from K = 2 on, the graph from 4 on."""
    real = Examination.point

    def at(self: Examination, keep: int, progress: object = None) -> KeepPoint:
        return KeepPoint(keep, float(keep >= 2), 0.0, 1.0, 1.0, 0.0)

    def point(self: Examination, keep: int, see: Any, progress: Any = None) -> KeepPoint:
        found = real(shortened(self), keep, see)
        return dataclasses.replace(found, agreement=float(keep >= least))

    monkeypatch.setattr(Examination, "at", at)
    monkeypatch.setattr(Examination, "point", point)
    said: list[str] = []
    request = ExportRequest(
        str(resampled),
        "auto",
        "cpu",
        tmp_path / "b",
        select="norm",
        search=Wish(0.9, "scenes", 4, limit=1),
        report=False,
    )
    least = 4
    summary = export_model(request, say=said.append)
    curve = summary.curve
    assert curve is not None and summary.keep == 4
    assert [(one.keep, one.agreement) for one in curve.graph] == [(2, 0.0), (3, 0.0), (4, 1.0)]
    assert curve.chosen.keep == 4 and sum("exported vision graph" in line for line in said) == 3
    assert verify(tmp_path / "b").passed and [place.name for place in tmp_path.iterdir()] == ["b"]


def shortened(examination: Examination) -> Examination:
    """The examination with its first picture alone: the graph is run, and quickly."""
    examination.pictures[1:] = []
    return examination


def test_where_no_graph_agrees_nothing_is_written(
    resampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of every graph are spoilt."""
    monkeypatch.setattr("svdprune.exporter.calibrate.graph.GraphEyes.view", _blind)
    monkeypatch.setattr("svdprune.exporter.calibrate.keep.keep_grid", lambda tokens: [4, 8])
    monkeypatch.setattr(Examination, "at", lambda *_: KeepPoint(_[1], 1.0, 0.0, 1.0, 1.0, 0.0))
    request = ExportRequest(
        str(resampled),
        "auto",
        "cpu",
        tmp_path / "b",
        select="norm",
        search=Wish(1.0, "scenes", 4, limit=2),
        report=False,
    )
    with pytest.raises(UserError, match=r"no K below \d+ whose exported vision graph \(fp32\) reaches an agreement"):
        export_model(request)
    assert list(tmp_path.iterdir()) == []


def _blind(self: Any, picture: Asked) -> Any:
    examination: Examination = self._examination
    view = examination.model.view(picture.seen, np.arange(4), "compact")
    return dataclasses.replace(view, rows=torch.zeros_like(view.rows))


OTHERS = {
    "smolvlm": shuffled_models.save_smolvlm,
    "internvl": shuffled_models.save_internvl,
    "qwen2_5_vl": qwen_models.save_qwen2_5,
}


@pytest.mark.parametrize("family", list(OTHERS))
def test_the_judge_says_what_transformers_says_in_every_family(family: str, tmp_path: Path) -> None:
    """Rows between tiles, text around them, positions of three axes: views of different lengths in one batch."""
    checkpoint = Checkpoint(OTHERS[family](tmp_path / family))
    model = Model(checkpoint, family)
    reference = load_reference(checkpoint, lambda note: None)
    seen = model.see(picture((96, 64)))
    prompts = [model.prompt(question) for question in ("What is it?", "How many objects are there in the picture?")]
    few = [np.array([0, seen.count // 2, seen.count - 1]), np.array([1, 2, 3, 4])]
    views = [model.view(seen, kept, policy) for kept in few for policy in ("compact", "original")]
    whole = model.whole(seen)
    judge = Judge(model, LIMIT)
    said = judge.listen(whole, prompts)

    def alone(view: View, prompt: list[int]) -> list[int]:
        places = picture_places(prompt, model.text.image_token_id, 1)
        layout = Layout(places, (view.span,), view.positions, model.axes)
        made = [Pictured(view.span, view.rows.numpy())]
        ids, stopped, _ = reference_answer(reference, layout, prompt, made, sorted(model.eos), limit=LIMIT)
        return ids if stopped == "length" else [*ids, -1]

    def cut(ids: list[int]) -> list[int]:
        return [-1 if token in model.eos else token for token in ids]

    assert [cut(one.ids) for one in said] == [alone(whole, prompt) for prompt in prompts]
    verdicts = judge.compare(views, prompts, said, [True] * len(prompts))
    for view, line in zip(views, verdicts, strict=True):
        assert [cut(one.ids or []) for one in line] == [alone(view, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("save", "said"),
    [(qwen_models.save_qwen3, r"several layers \(DeepStack\)"), (gemma_models.save_gemma3, "see each other")],
    ids=["qwen3_vl", "gemma3"],
)
def test_what_the_judge_cannot_run_is_refused_before_the_weights_are_read(save: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        Model(Checkpoint(save(tmp_path / "model")), "tiny")
