"""`profile`: every stage is timed on real input, pruned and unpruned in turn, and told as text, JSON and a chart."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from golden import QUESTION, golden_bundle
from PIL import Image

pytest.importorskip("polygraphy", reason="profiling needs Polygraphy")

from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import MissingDependency, NumericalError, UserError
from svdprune.runtime.profile import graphs, measure
from svdprune.runtime.profile.measure import Plan, profile
from svdprune.runtime.profile.report import STAGES
from svdprune.runtime.profile.stats import Summary
from svdprune.runtime.profile.text import profile_text

SHORT = Plan(runs=3, warm_up=1, new_tokens=2)


@pytest.fixture(scope="module")
def right(bundle, tmp_path_factory):
    """The tiny bundle with its golden case."""
    return golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")


@pytest.fixture(scope="module")
def report(right):
    return profile(right, threads=1, plan=SHORT)


def test_every_stage_of_both_graphs_is_timed(report):
    assert (report.pruned.tokens, report.unpruned.tokens) == (tiny.KEEP, tiny.TOKENS)
    assert report.unpruned.prompt - report.pruned.prompt == tiny.TOKENS - tiny.KEEP
    for arm in (report.pruned, report.unpruned):
        assert set(STAGES) - {"selection"} <= set(arm.stages)
        for name, summary in arm.stages.items():
            assert 0 < summary.median <= summary.p90 <= summary.p99, name
            assert summary.count == (6 if name == "decode" else 3), name
    assert set(report.ratios) == {"vision", "prefill", "decode", "first_token", "total"}
    first = report.pruned.stages["first_token"].median
    assert first >= report.pruned.stages["prefill"].median and report.pruned.stages["total"].median > first
    assert report.question == QUESTION and report.image.endswith("golden/image.png")


def test_the_figures_are_said_to_be_a_cpu_s(report):
    where = report.where
    assert where.kind == "CPU" and where.processor and where.cores >= 1 and where.threads == 1
    assert {"Python", "svdprune", "numpy", "onnxruntime", "polygraphy"} <= set(where.versions)
    assert "CPU figures: " in profile_text(report, 0) and "1 thread," in profile_text(report, 0)


def test_layers_are_timed_by_node_and_operator(report):
    table = report.pruned.layers
    names = {layer.operator for layer in table.layers}
    assert {"TopK", "Unsqueeze"} <= names and table.runs == 3
    assert sum(layer.share for layer in table.layers) == pytest.approx(1.0)
    assert [layer.seconds for layer in table.layers] == sorted((x.seconds for x in table.layers), reverse=True)
    assert set(table.operators) == names
    assert "TopK" not in report.unpruned.layers.operators


def test_the_picture_and_not_zeros_is_what_runs(right, monkeypatch, tmp_path):
    seen = []
    real = graphs.onnxrt_runner

    def watched(session, name):
        runner = real(session, name)
        infer = runner.infer

        def record(feed_dict, check_inputs=True):
            seen.append((name, feed_dict["pixels"].copy()))
            return infer(feed_dict, check_inputs=check_inputs)

        runner.infer = record
        return runner

    monkeypatch.setattr(graphs, "onnxrt_runner", watched)
    other = tmp_path / "other.png"
    tiny.picture(seed=9).save(other)
    profile(right, threads=1, image=other, question="Why?", plan=Plan(3, 1, 1, layers=False))
    assert [name for name, _ in seen] == ["pruned", "unpruned", "unpruned", "pruned"] * 2  # in turn, alternating
    assert all(pixels.std() > 1 and (pixels == seen[0][1]).all() for _, pixels in seen)


def test_the_unpruned_graph_can_be_left_out(right):
    alone = profile(right, threads=1, plan=Plan(1, 0, 1, unpruned=False, layers=False))
    assert alone.unpruned is None and alone.ratios == {} and alone.pruned.layers is None
    text = profile_text(alone, 8)
    assert "left out" in text and "ratio" not in text


def test_text_fits_eighty_columns(report):
    wide = dataclasses.replace(report, model="organisation/" + "a-long-name-" * 6, bundle="b" * 200)
    slow = {name: Summary(123.4, 133.4, 144.4, 3) for name in report.pruned.stages}
    wide = dataclasses.replace(wide, pruned=dataclasses.replace(report.pruned, stages=slow, notes=["word " * 30]))
    for text in (profile_text(report, 8), profile_text(wide, 8)):
        assert max(map(len, text.splitlines())) <= 80
    assert "123400.0" in profile_text(wide, 8)
    assert "slowest layers" not in profile_text(report, 0)


@pytest.mark.parametrize(
    ("plan", "words"),
    [({"runs": 0}, "runs is 0"), ({"warm_up": -1}, "warm_up is -1"), ({"new_tokens": 0}, "new_tokens is 0")],
)
def test_counts_out_of_range_are_refused(plan, words):
    with pytest.raises(UserError, match=words):
        Plan(**plan)


def test_a_prompt_that_does_not_fit_is_refused_before_the_work(right, monkeypatch):
    monkeypatch.setattr(measure, "in_turn", None)  # reached, it would fail otherwise
    text = "x" * (tiny.CONTEXT - 40)
    with pytest.raises(UserError, match=r"the unpruned prompt and 16 new tokens need \d+ places .* give --no-unpruned"):
        profile(right, threads=1, question=text)
    with pytest.raises(UserError, match=r"the pruned prompt .* ask a shorter question or decode fewer tokens"):
        profile(right, threads=1, question=text, plan=Plan(new_tokens=40))


def test_nan_is_an_error(bundle, tmp_path):
    poisoned = tiny.make_bundle(tmp_path / "poisoned", poison="features")
    black = tmp_path / "black.png"
    Image.new("RGB", (40, 40)).save(black)
    with pytest.raises(NumericalError, match="features as NaN"):
        profile(poisoned, threads=1, image=black, question="Why?", plan=SHORT)


def test_backends_that_cannot_be_profiled_are_said(right):
    with pytest.raises(UserError, match="no vision backend is called"):
        profile(right, "onnx")


@pytest.mark.parametrize(
    ("module", "words"), [("polygraphy", "profiling and comparing"), ("onnx", "the unpruned graph")]
)
def test_a_missing_package_is_named(right, module, words, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingDependency, match=rf"{words} needs the package `{module}`.*svdprune\[profile\]"):
        profile(right, threads=1, plan=SHORT)


def test_the_command_prints_draws_and_writes_json(right, tmp_path):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    runner, chart = CliRunner(), tmp_path / "chart.png"
    few = ["--runs", "2", "--warm-up", "0", "--new-tokens", "1", "--threads", "1"]
    text = runner.invoke(group, ["profile", str(right), *few, "--chart", str(chart), "--layers", "2"])
    assert text.exit_code == 0, text.output
    assert "CPU figures" in text.stdout and "slowest layers" in text.stdout and str(chart) in text.stdout
    with Image.open(chart) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    content = json.loads(runner.invoke(group, ["profile", str(right), *few, "--no-unpruned", "--json"]).stdout)
    assert content["pruned"]["stages"]["vision"]["count"] == 2 and content["unpruned"] is None
    assert content["pruned"]["layers"]["layers"][0]["operator"]


@pytest.mark.parametrize(
    ("place", "words"), [("chart.jpg", "does not end in .png"), ("no/chart.png", "there is no folder")]
)
def test_a_chart_that_cannot_be_written_is_refused_before_the_work(right, tmp_path, place, words):
    result = CliRunner().invoke(group, ["profile", str(right), "--chart", str(tmp_path / place)])
    assert result.exit_code == 2 and words in result.stderr and not result.stdout


def test_the_modules_import_without_what_the_extra_brings():
    code = (
        "import sys\n"
        "import svdprune.runtime.profile.measure, svdprune.runtime.profile.chart, svdprune.runtime.verify_against\n"
        "found = {'polygraphy', 'matplotlib', 'onnx', 'tensorrt', 'tensorrt_rtx', 'cuda'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
