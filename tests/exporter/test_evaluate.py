"""Evaluation of a checkpoint and of a bundle, against answers generated one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from svdprune.calib.evaluate.bundle import evaluate_bundle
from svdprune.calib.evaluate.report import Report
from svdprune.calib.sources import open_source
from svdprune.calib.statistics import kl_divergence
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.contenders import SEEDS, VARIANT_NAMES, parse_contenders
from svdprune.exporter.evaluate.judge import Judge
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.run import Chooser, evaluate_model
from svdprune.exporter.evaluate.seen import View
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.golden import load_reference, reference_answer
from svdprune.exporter.selection import build_selector, keep_indices, selector_names
from svdprune.runtime import load
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import one_picture, picture_place
from svdprune.runtime.prompt import Pictured

LIMIT = 6
QUESTIONS = ["What color is the star?", "How many objects are there?", "Is the ring left of the red heart?"]


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Model:
    return Model(Checkpoint(tiny_llava), "tiny")


def views(model: Model, sample: int = 0) -> tuple[list[View], View]:
    """Views of a picture at K = 4, under both policies, and of all its tokens."""
    source = open_source("scenes", limit=sample + 1, seed=0)
    seen = model.see(list(source.samples())[sample].image)
    pruned = [
        model.view(seen, np.array(kept), policy)
        for kept in ([0, 3, 5, 8], [1, 2, 4, 7])
        for policy in ("compact", "original")
    ]
    return pruned, model.whole(seen)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_verdicts_are_those_of_answers_generated_one_at_a_time(model: Model, tiny_llava: Path, batch: int) -> None:
    reference = load_reference(Checkpoint(tiny_llava), lambda note: None)
    prompts = [model.prompt(question) for question in QUESTIONS]

    def alone(view: View, prompt: list[int]) -> tuple[list[int], np.ndarray]:
        place = picture_place(prompt, model.text.image_token_id)
        layout = one_picture(place, view.span.kept, view.span.total, view.positions)
        ids, stopped, logits = reference_answer(
            reference, layout, prompt, [Pictured(layout.spans[0], view.rows.numpy())], sorted(model.eos), limit=LIMIT
        )
        if stopped == "eos":
            ids = [*ids, next(iter(model.eos))]
        return ids, torch.from_numpy(logits).log_softmax(-1).numpy()

    judge = Judge(model, LIMIT, batch)
    differing = 0
    for sample in range(3):
        pruned, whole = views(model, sample)
        said = judge.listen(whole, prompts)
        for prompt, one in zip(prompts, said, strict=True):
            ids, first = alone(whole, prompt)
            assert one.ids == ids
            np.testing.assert_allclose(one.first, first, atol=1e-4)
        verdicts = judge.compare(pruned, prompts, said, [True, True, False])
        for view, line in zip(pruned, verdicts, strict=True):
            for number, (prompt, one, verdict) in enumerate(zip(prompts, said, line, strict=True)):
                ids, first = alone(view, prompt)
                common = next((n for n, (a, b) in enumerate(zip(ids, one.ids, strict=False)) if a != b), None)
                assert verdict.same == (ids == one.ids)
                assert verdict.matched == (len(one.ids) if common is None else common)
                assert verdict.kl == pytest.approx(float(kl_divergence(one.first, first)), abs=1e-4)
                assert verdict.ids == (ids if verdict.same or number < 2 else None)
                differing += not verdict.same
    assert differing > 5  # otherwise the free generation was not looked at


def test_contenders_are_read_from_what_was_typed() -> None:
    every = parse_contenders([])
    assert {c.label for c in every} == set(selector_names()) - {"none"}
    assert {len(c.configs) for c in every if c.label != "random"} == {1}
    chance = next(c for c in every if c.label == "random")
    assert [config.seed for config in chance.configs] == list(range(SEEDS))
    (one,) = parse_contenders(["leverage:rank=8:centre:tap=-1"])
    assert (one.configs[0].rank, one.configs[0].centre, one.tap) == (8, True, -1)
    (other,) = parse_contenders(["leverage:variance=0.9:tap=projected"], seed=3)
    assert (other.configs[0].variance, other.configs[0].seed, other.tap) == (0.9, 3, "projected")
    assert [c.label for c in parse_contenders(["leverage", "variants"])] == ["leverage", *VARIANT_NAMES]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["leverge"], "did you mean leverage"),
        (["none"], "always measured"),
        (["grid", "grid"], "named twice"),
        (["leverage:rang=8"], "'rang=8' that is not known"),
        (["leverage:rank=x"], "a number is needed"),
        (["leverage:tap=last"], "a number is needed"),
        (["leverage:rank=0"], "1 or more"),
        (["grid:rank=8"], "does not use rank"),
        (["grid:centre"], "does not use centre"),
    ],
)
def test_a_contender_that_cannot_be_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_contenders(names)


def test_choices_are_the_selectors_own(model: Model) -> None:
    contenders = parse_contenders(["leverage:rank=3", "maxmin", "cls", "random", "leverage:rank=3:tap=projected"])
    chooser = Chooser(model, contenders, [4, 2])
    seen = model.see(next(iter(open_source("scenes", limit=1, seed=0).samples())).image, projected=True)
    choices = chooser.choose(seen)
    assert len(choices) == 2 * (4 + SEEDS)
    spec = model.spec
    for (number, seed, keep), (kept, seconds) in choices.items():
        contender = contenders[number]
        tokens, attention = seen.at(contender.tap)
        scorer = build_selector(contender.configs[seed], spec.tokens, tokens.shape[2], grid=spec.grid, keep=keep)
        np.testing.assert_array_equal(kept, keep_indices(scorer(tokens, attention)[0].numpy(), keep))
        assert seconds > 0
    assert not np.array_equal(choices[3, 0, 4][0], choices[3, 1, 4][0])


def test_another_tap_is_that_hidden_state(model: Model, tiny_llava: Path) -> None:
    own = Model(Checkpoint(tiny_llava), "tiny")
    own.add_tap(-1)
    own.add_tap(-2)
    sample = next(iter(open_source("scenes", limit=1, seed=0).samples()))
    seen = own.see(sample.image)
    torch.testing.assert_close(seen.at(-2)[0], seen.tokens)
    last = own.family.encoder(own.checkpoint)
    assert seen.at(-1)[0].shape == seen.tokens.shape and not torch.equal(seen.at(-1)[0], seen.tokens)
    assert last is not None and own.checkpoint.config["vision_feature_layer"] == -2


def evaluated(model: Model, spec: str, names: list[str], keeps: list[int]) -> Report:
    source = open_source(spec, limit=3, seed=0)
    return evaluate_model(model, "tiny", source, parse_contenders(names), keeps, ["compact", "original"], limit=LIMIT)


def test_a_checkpoint_is_measured(model: Model) -> None:
    tokens = model.spec.tokens
    report = evaluated(model, "scenes", ["leverage:rank=3", "random", "grid"], [tokens, 4])
    assert [(r.selector, r.keep, r.positions) for r in report.rows][:3] == [
        ("none", tokens, "compact"),
        ("leverage:rank=3", tokens, "compact"),
        ("leverage:rank=3", tokens, "original"),
    ]
    assert len(report.rows) == 1 + 3 * 2 * 2
    unpruned = report.rows[0].accuracy
    for row in report.rows:
        assert row.accuracy is not None and row.agreement is not None and row.kl is not None
        if row.keep == tokens:  # nothing is left out, so nothing may change
            assert row.agreement.value == row.matched == 1.0 and row.kl.value < 1e-5
            assert unpruned is not None and row.accuracy.value == unpruned.value
        elif row.selector != "none":
            assert row.agreement.value < 1.0 and row.kl.value > 1e-4 and row.select_seconds is not None
    assert report.pictures == 3 and report.labelled
    assert (report.rows[-3].spread is None) != (report.rows[-3].selector == "random")


def test_unlabelled_pictures_are_asked_general_questions(model: Model, tmp_path: Path) -> None:
    for number, sample in enumerate(open_source("scenes", limit=3, seed=0).samples()):
        sample.image.save(tmp_path / f"{number}.png")
    report = evaluated(model, str(tmp_path), ["leverage:rank=3"], [4])
    assert not report.labelled and report.rows[0].questions == 9
    assert all(row.accuracy is None and row.agreement is not None for row in report.rows)


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "bundle"
    export_model(ExportRequest(str(tiny_llava), "4", out=out, select="leverage", rank=3))
    return out


def test_a_bundle_answers_as_its_checkpoint_is_measured_to(bundle: Path, model: Model) -> None:
    source = open_source("scenes", limit=3, seed=0)
    report = evaluate_bundle(load(bundle), source, limit=LIMIT)
    expected = evaluated(model, "scenes", ["leverage:rank=3"], [4])
    assert [(r.selector, r.keep) for r in report.rows] == [("none", 9), ("leverage", 4)]
    for mine, theirs in zip(report.rows, expected.rows[:2], strict=True):
        assert mine.accuracy == theirs.accuracy and mine.agreement == theirs.agreement
        assert mine.matched == pytest.approx(theirs.matched)
        assert mine.kl is not None and theirs.kl is not None
        assert mine.kl.value == pytest.approx(theirs.kl.value, abs=1e-4)


def test_without_onnx_a_labelled_bundle_is_measured_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdprune.runtime.errors import MissingDependency

    def absent(*_: object) -> Path:
        raise MissingDependency("onnx", "profile", "the unpruned graph")

    monkeypatch.setattr("svdprune.calib.evaluate.bundle.unpruned_graph", absent)
    report = evaluate_bundle(load(bundle), open_source("scenes", limit=2, seed=0), limit=LIMIT)
    (only,) = report.rows
    assert only.accuracy is not None and only.agreement is None
    assert report.facts["unpruned"].startswith("not measured: the unpruned graph needs the package `onnx`")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_prints_json_and_writes_the_files(tiny_llava: Path, tmp_path: Path) -> None:
    code, output = run(
        tiny_llava, "--pictures", 2, "--keep", "4,30%", "--selectors", "leverage:rank=3,grid",
        "--positions", "original", "--max-new-tokens", 4, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, output
    content = json.loads(output[output.index("{") :])
    assert [(r["selector"], r["keep"]) for r in content["rows"]] == [
        ("none", 9),
        ("leverage:rank=3", 4),
        ("grid", 4),
        ("leverage:rank=3", 3),
        ("grid", 3),
    ]
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".csv", ".json", ".md", ".png"]


def test_the_command_measures_a_bundle_and_names_broken_pictures(bundle: Path, tmp_path: Path) -> None:
    next(iter(open_source("scenes", limit=1, seed=0).samples())).image.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    code, output = run(bundle, "--data", tmp_path, "--question", "What color is the star?", "--max-new-tokens", 3)
    assert code == 0, output
    assert "1 could not be used: bad.png" in output and "agreement" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "100"], "the picture has 9"),
        ([], "the model has 9 vision tokens"),
        (["--selectors", "leverge"], "did you mean leverage"),
        (["--keep", "4", "--selectors", "leverage:rank=30"], "rank 30 is more than"),
        (["--positions", "middle"], "'middle' is not known"),
        (["--data", "nowhere"], "no source of that name"),
        (["--vision-backend", "tensorrt"], "is not a bundle"),
        (["--device", "cuda:9"], "torch cannot use cuda:9"),
        (["--out", "gone/results"], "there is no folder"),
    ],
)
def test_the_commands_mistakes_are_one_sentence(tiny_llava: Path, arguments: list[str], said: str) -> None:
    code, output = run(tiny_llava, "--pictures", 1, *arguments)
    assert code == 2 and said in output, output


def test_a_bundle_takes_no_selectors(bundle: Path) -> None:
    code, output = run(bundle, "--keep", "4", "--selectors", "grid")
    assert code == 2 and "leave out --keep, --selectors" in output
