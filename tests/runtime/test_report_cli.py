"""`svdprune report` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import tiny
from click.testing import CliRunner
from golden import QUESTION, golden_bundle
from page_reader import check
from report_cases import profile_of

from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.report import PAGE


@pytest.fixture(scope="module")
def right(bundle, tmp_path_factory):
    return golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")


@pytest.fixture
def report(right, tmp_path, monkeypatch):
    """Call ``svdprune report`` on a copy, in an empty working directory."""
    shutil.copytree(right, tmp_path / "bundle")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    runner = CliRunner()
    return lambda *words: runner.invoke(
        group, ["report", str(tmp_path / "bundle"), *map(str, words)], catch_exceptions=False
    )


def test_beside_the_bundle_by_default(report, tmp_path):
    result = report()
    assert result.exit_code == 0 and result.stdout == "report         bundle-report.html\n"
    assert [one.name for one in (tmp_path / "here").iterdir()] == ["bundle-report.html"]
    assert QUESTION in check((tmp_path / "here" / "bundle-report.html").read_text(encoding="utf-8")).text
    assert PAGE not in open_bundle(tmp_path / "bundle").manifest.files


def test_into_the_bundle(report, tmp_path):
    assert report("--out", tmp_path / "bundle" / PAGE).exit_code == 0
    assert PAGE in open_bundle(tmp_path / "bundle").manifest.files  # and every hash is right


def test_pictures_and_a_question(report, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        tiny.picture(number).save(folder / f"{number} & <b>.png")
    result = report("--images", folder, "--limit", 2, "--prompt", "Is it <dark>?", "--threads", 1, "--out", "a.html")
    assert result.exit_code == 0, result.stderr
    page = check((tmp_path / "here" / "a.html").read_text(encoding="utf-8"))
    assert len(page.pictures()) == 6 and "0 & <b>.png" in page.text and "2 & <b>.png" not in page.text
    assert page.text.count("Is it <dark>?") == 2 and "by this bundle: vision onnxruntime" in page.text


def test_pictures_alone_open_no_decoder(report, tmp_path, monkeypatch):
    tiny.picture(1).save(tmp_path / "one.png")
    result = report("--images", tmp_path / "one.png", "--decoder-backend", "no such thing")
    assert result.exit_code == 0, result.stderr
    page = check((tmp_path / "here" / "bundle-report.html").read_text(encoding="utf-8"))
    assert len(page.pictures()) == 4 and page.text.count("Answer") == 1


def test_a_profile(report, right, tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(dataclasses.asdict(profile_of(right))))
    assert report("--profile", file).exit_code == 0
    text = (tmp_path / "here" / "bundle-report.html").read_text(encoding="utf-8")
    assert "GPU figures: Orin &lt;b&gt;" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("bundle: mini-llava", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "the field bundle is missing: give what `svdprune profile BUNDLE --json` printed"),
        ('{"bundle": 1e999}', "it must be a finite number"),
    ],
)
def test_a_profile_that_is_none(report, tmp_path, content, said):
    file = tmp_path / "profile.json"
    if content is not None:
        file.write_text(content)
    result = report("--profile", file)
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) <= 2
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "What?"), "--prompt is asked about the pictures of --images"),
        (("--images", "missing.png"), "missing.png"),
        (("--out", "page.txt"), "let it end in .html"),
        (("--images", ".", "--out", "a.html"), "holds no pictures"),
    ],
)
def test_what_cannot_be(report, tmp_path, words, said):
    result = report(*words)
    assert result.exit_code == 2 and said in result.stderr
    assert list((tmp_path / "here").iterdir()) == []


def test_a_changed_bundle_is_refused(report, tmp_path):
    (tmp_path / "bundle" / "vision.onnx").write_bytes(b"")
    result = report()
    assert result.exit_code == 2 and "vision.onnx" in result.stderr


def test_a_device_needs_nothing_of_the_exporter(right, tmp_path):
    code = (
        "import sys\nfrom svdprune.runtime.cli.app import group\n"
        f"group(['report', {str(right)!r}, '--out', {str(tmp_path / 'a.html')!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'matplotlib', 'polygraphy', 'tensorrt', 'svdprune.exporter',"
        " 'svdprune.calib', 'onnxruntime'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
