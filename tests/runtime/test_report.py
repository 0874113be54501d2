"""`report.html`: one page that stands alone, says what the bundle says, and trusts no text that it is given."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil

import numpy as np
import pytest
import tiny
from golden import QUESTION, golden_bundle
from page_reader import Page, check
from PIL import Image
from report_cases import again, facts_of, profile_of

from svdprune.calib.calibration import ARRAYS, FILE
from svdprune.calib.keep_curve import KeepCurve, KeepPoint, KeepSource, Saving
from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.engines.key import EngineKey, graph_digest
from svdprune.runtime.engines.store import put_engine
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import BlockSensitivity, CalibrationInfo, QuantisationInfo
from svdprune.runtime.report import FACTS, PAGE
from svdprune.runtime.report import measure as measuring
from svdprune.runtime.report import place as placing
from svdprune.runtime.report.facts import Energy, Facts, read_facts
from svdprune.runtime.report.measure import quick_profile
from svdprune.runtime.report.page import _code, check_profile, render_page
from svdprune.runtime.report.pictures import (
    JPEG,
    LARGE,
    PNG,
    WIDTH,
    golden_picture,
    pack,
    picture_files,
    shown,
    store_pictures,
)
from svdprune.runtime.report.place import put_page

SECTIONS = [
    "kept",
    "energy",
    "agreement",
    "times",
    "estimate",
    "memory",
    "quantisation",
    "engines",
    "settings",
    "files",
]
EVIL = '</title><script>alert("1")</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }} & `code` \x00\x1b\ud800'
SAID = '</title><script>alert("1")</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }} & '


@pytest.fixture(scope="module")
def right(bundle, tmp_path_factory):
    """The tiny bundle with its golden case."""
    return golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")


@pytest.fixture
def here(right, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(right, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_page_from_the_bundle_alone(right):
    opened = open_bundle(right)
    page = check(render_page(opened, read_facts(opened)))
    assert [tag.attributes["id"] for tag in page.all("section")] == SECTIONS
    kept, vision = page.section("kept").text, opened.manifest.vision
    assert f"{tiny.KEEP} of {tiny.TOKENS} vision tokens kept" in " ".join(kept.split())
    assert QUESTION in kept and len(page.all("img")) == 2
    assert "--keep auto" in page.section("agreement").text and not page.all("svg")
    assert "svdprune profile" in page.section("times").text
    assert "not quantised" in page.section("quantisation").text
    assert f"{vision.precision}" in page.section("settings").text
    assert "not known: the checkpoint names none" in page.section("settings").text
    for name in opened.manifest.files:
        assert name in page.section("files").text


def test_every_setting_of_the_manifest_is_on_the_page(right):
    opened = open_bundle(right)
    tags = Page(render_page(opened, Facts())).tags
    rows = {(a.text, b.text) for a, b in itertools.pairwise(tags) if (a.name, b.name) == ("th", "td")}
    assert {("keep", str(tiny.KEEP)), ("selector.name", opened.manifest.vision.selector.name)} <= rows
    assert ("generation.max_new_tokens", "256") in rows and ("calibration", "not set") in rows
    assert ("id", opened.manifest.model.id) in rows


def test_a_full_page(right):
    opened = open_bundle(right)
    page = check(render_page(opened, facts_of(), profile=profile_of(right)))
    energy, times, estimate = (page.section(name).text for name in ("energy", "times", "estimate"))
    assert "mean of 4 pictures (folder)" in energy and len(page.all("svg")) == 3
    assert "GPU figures: Orin <b>" in times and "3.00x" in times and "pruned: a remark" in times
    assert "90th percentile" in times and "select/TopK" in times
    assert "a roofline model, not a measurement" in estimate and "A note of the model." in estimate
    assert "rtx-40 (RTX 4090)" in estimate and "4.00x" in estimate and "not known" in estimate
    assert "10.0 GB are free there" in page.section("memory").text
    assert "apache-2.0 (the model card)" in page.section("settings").text
    head = page.all("header")[0].text
    assert "12.0 ms" in head and "36.0 ms with all tokens" in head and "first token on jetson-orin" in head


def test_no_text_becomes_markup(right, tmp_path):
    whole = open_bundle(right).manifest
    case = json.loads((right / whole.golden.case).read_text()) | {"question": EVIL, "answer": EVIL, "dtype": EVIL}
    evil = again(
        right,
        tmp_path / "evil",
        {whole.golden.case: json.dumps(case)},
        model=dataclasses.replace(whole.model, id=EVIL.replace("\ud800", ""), revision="<b>"),
        vision=dataclasses.replace(whole.vision, selector=dataclasses.replace(whole.vision.selector, name="<i>")),
        written_by={"<u>": "</style>"},
    )
    vlm_picture = dataclasses.replace(golden_picture(evil), name=EVIL, question=EVIL, answer=EVIL, answered_by=EVIL)
    facts = dataclasses.replace(
        facts_of(), energy=[Energy(False, [0.5, 1.0], 1, EVIL)], estimate_note=EVIL, licence=EVIL, pictures_note=EVIL
    )
    html = render_page(evil, facts, [vlm_picture], profile_of(evil.path, model=evil.manifest.model.id))
    page = check(html)  # no script, no handler, no element that the template has not
    assert page.all("h1")[0].text.startswith(SAID) and page.all("title")[0].text.startswith(SAID)
    assert page.text.count(SAID.strip()) > 8
    assert "49" not in page.all("h1")[0].text
    assert len(page.all("img")) == 4 and page.all("style")[0].text.rstrip().endswith("}")
    assert not set("\x00\x1b\ud800") & set(html)
    html.encode("utf-8")


def test_backticks_make_code_and_nothing_else():
    assert _code("run `a <b>` now") == "run <code>a &lt;b&gt;</code> now"
    assert _code("a lone ` stays, <b>") == "a lone ` stays, &lt;b&gt;"
    assert _code("`one` and a lone `") == "<code>one</code> and a lone `"


def curve() -> KeepCurve:
    points = [KeepPoint(k, a, a - 0.1, min(1.0, a + 0.1), a, 1 - a, a) for k, a in ((2, 0.5), (4, 0.99), (8, 1.0))]
    source = KeepSource("folder", "7 <odd> pictures", seed=0, pictures=7, questions=21, limit=32, broken=[])
    saving = Saving([1e9, 4e9], [1000, 5000], [0.001, 0.004])
    return KeepCurve(
        0.98, 4, 16, [1, 2, 4, 8], points, [2], 0.9, "compact", 20, source, saving,
        precision="fp16", graph=[points[0], points[1]], decoder="int4", bundle=points[0],
    )  # fmt: skip


def calibrated() -> dict[str, bytes]:
    """The files of a calibration, as far as the page reads them."""
    record = {
        "features": {"tap": -2},
        "pictures": {"description": "a folder", "start": 8, "choice": 4, "judgement": 4},
        "energy": [{"tap": "-2", "centre": False, "ranks": {"0.8": 2, "0.9": 3}}],
        "criterion": "agreement of the answers",
        "settings": {"rank": 3},
    }
    with_curves = {f"energy/-2/{name}": np.array([0.6, 0.9, 1.0]) for name in ("raw", "centred")}
    np.savez(packed := io.BytesIO(), **with_curves)
    return {f"calibration/{FILE}": json.dumps(record).encode(), f"calibration/{ARRAYS}": packed.getvalue()}


def test_what_the_users_pictures_decided(right, tmp_path):
    info = CalibrationInfo(f"calibration/{FILE}", f"calibration/{ARRAYS}", keep="calibration/keep.json")
    files = {**calibrated(), "calibration/keep.json": curve().to_json()}
    page = check(render_page(again(right, tmp_path / "b", files, calibration=info), facts_of()))
    energy, agreement = " ".join(page.section("energy").text.split()), page.section("agreement").text
    assert "mean of 8 pictures (a folder)" in energy and "8 pictures made the start, 4 chose, 4 judged" in energy
    assert "K = 4 is the smallest at which 98.0 %" in agreement and "7 <odd> pictures" in agreement
    assert "99.0 % (89 % to 109 %)" not in agreement and "99.0 % (89 % to 100 %)" in agreement
    assert "4.00x" in agreement and "1.00 ms instead of 4.00 ms" in agreement and "K = 2 agrees too" in agreement
    assert "exported vision graph (" in agreement and "K was raised for that from 2 (50.0 %)" in agreement
    assert "as well, by ONNX Runtime, 50.0 %" in agreement
    chart = page.all("svg")[1]
    assert "K = 4" in chart.text and "wished: 98.0 %" in chart.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("calibration/keep.json", "{}"),
        ("calibration/keep.json", "[1]"),
        ("calibration/keep.json", '{"wished": 1e999}'),
        ("calibration/keep.json", "nonsense"),
        (f"calibration/{ARRAYS}", "no arrays"),
        (f"calibration/{FILE}", '{"features": 3}'),
        (FACTS, '{"schema": 1, "energy": 3}'),
        (FACTS, '{"schema": 1, "unheard": 3}'),
        (FACTS, '{"schema": 99}'),
        (FACTS, '{"energy": [{"centre": false, "curve": [NaN], "pictures": 1, "source": ""}]}'),
        (FACTS, "[" * 100_000),
    ],
)
def test_files_that_are_not_as_they_were_written(right, tmp_path, name, content):
    info = CalibrationInfo(f"calibration/{FILE}", f"calibration/{ARRAYS}", keep="calibration/keep.json")
    files = {**calibrated(), "calibration/keep.json": curve().to_json(), name: content}
    opened = again(right, tmp_path / "b", files, calibration=info)
    with pytest.raises(BundleError, match=name.rpartition("/")[2].partition(".")[0]):
        render_page(opened, read_facts(opened))


def test_the_facts_are_read_as_they_were_written(right, tmp_path):
    facts = dataclasses.replace(facts_of(), measured=profile_of(right))
    assert read_facts(again(right, tmp_path / "b", {FACTS: facts.to_json()})) == facts


def test_an_8_bit_graph_says_what_changed(right, tmp_path):
    vision = open_bundle(right).manifest.vision
    info = QuantisationInfo(
        "fp16", "max", "folder", 60, 8, 16, 16, 2, ["encoder.layers.1"], True, 0.999, 0.97, 0.9, 0.01, 0.95, 0.3,
        [BlockSensitivity("encoder.layers.1", 0.9, 0.5, 0.2), BlockSensitivity("encoder.layers.0", 0.99, 0.9, 0.02)],
    )  # fmt: skip
    eight = again(right, tmp_path / "b", vision=dataclasses.replace(vision, precision="int8", quantisation=info))
    text = check(render_page(eight, Facts())).section("quantisation").text
    assert "97.0% of the kept set the same" in text and "50.00 %" in text and "encoder.layers.0" in text


def test_the_engines_that_were_built(here):
    opened = open_bundle(here)
    key = EngineKey("tensorrt", "10.3.0", 87, graph_digest(opened, "vision"), {})
    info = {"built": "2026-01-01", "selftest": "passed", "seconds": 12.3, "layers": 40, "target": "jetson-<orin>"}
    put_engine(opened, "vision", key, b"engine", info)
    stale = dataclasses.replace(key, graph="0" * 64)
    made = put_engine(opened, "vision", stale, b"engine", {})  # a build.json that says little
    text = " ".join(check(render_page(opened, Facts())).section("engines").text.split())
    assert "TensorRT 10.3.0" in text and "jetson-<orin>, sm 87" in text and "12.3 s" in text and "passed" in text
    assert "stale: of another graph" in text
    made.path.write_bytes(b"eng")
    assert "truncated" in check(render_page(opened, Facts())).section("engines").text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, "model other"),
        ({"tokens": 99}, "vision tokens 99"),
        ({"vision_precision": "int8"}, "vision precision int8"),
        ({"target": "h100"}, "target h100"),
    ],
)
def test_the_profile_of_another_bundle_is_refused(right, changes, said):
    with pytest.raises(UserError, match=f"{said}, here .*: profile this one"):
        check_profile(profile_of(right, **changes), open_bundle(right).manifest)


def test_a_short_measurement(right, tmp_path):
    pytest.importorskip("onnx", reason="the unpruned graph needs onnx")
    with load(right, threads=1) as vlm:
        found = quick_profile(vlm, tmp_path, threads=1)
    assert found.unpruned is not None and (found.pruned.tokens, found.unpruned.tokens) == (tiny.KEEP, tiny.TOKENS)
    assert found.unpruned.prompt - found.pruned.prompt == tiny.TOKENS - tiny.KEEP
    assert (found.runs, found.warm_up, found.where.kind, found.where.threads) == (measuring.MOST_RUNS, 1, "CPU", 1)
    assert found.pruned.stages["vision"].count == measuring.MOST_RUNS and found.pruned.notes == []
    opened = open_bundle(right)
    text = check(render_page(opened, Facts(measured=found))).section("times").text
    assert (
        "CPU figures: " in text and "1 thread" in text and "A short measurement while the bundle was exported" in text
    )
    assert "90th percentile" not in text  # of five runs


def test_a_slow_machine_measures_once(right, tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="the unpruned graph needs onnx")
    monkeypatch.setattr(measuring, "PATIENCE", 0.0)
    with load(right, threads=1) as vlm:
        found = quick_profile(vlm, tmp_path)
    assert (found.runs, found.warm_up, found.pruned.stages["vision"].count) == (1, 0, 1)


def test_pictures_that_the_export_drew_are_there_again(right, tmp_path):
    with load(right, threads=1) as vlm:
        seen = shown("mine.png", vlm.see(tiny.picture(5)), vlm.manifest.vision, "What?", "that")
    stored = store_pictures(tmp_path, [seen])
    files = {one.relative_to(tmp_path).as_posix(): one.read_bytes() for one in tmp_path.glob("report/*")}
    opened = again(right, tmp_path / "b", {FACTS: Facts(pictures=stored).to_json(), **files})
    page = check(render_page(opened, read_facts(opened)))
    assert "mine.png" in page.text and "that (by this bundle, at export)" in page.text and len(page.pictures()) == 4
    spoilt = again(right, tmp_path / "c", {FACTS: Facts(pictures=stored).to_json(), **dict.fromkeys(files, b"no")})
    with pytest.raises(BundleError, match="cannot be read as a picture"):
        render_page(spoilt, read_facts(spoilt))


def test_large_photographs_are_made_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1400, 3), np.uint8))
    packed, flat = pack(noise), pack(Image.new("RGB", (300, 200)))
    assert (packed.media, packed.width, packed.height) == (JPEG, WIDTH, WIDTH // 2) and len(packed.data) < LARGE
    assert (flat.media, flat.width) == (PNG, 300)


def test_the_bundles_own_page_is_replaced_without_a_bad_moment(here, monkeypatch):
    page = render_page(open_bundle(here), Facts())
    put_page(open_bundle(here), page, here / PAGE)
    first = open_bundle(here)  # all hashes
    assert first.read_text(PAGE) == page and PAGE in first.manifest.files
    real = placing.os.replace
    for step in range(3):
        calls = iter(range(9))

        def breaks(source, target, step=step, calls=calls):
            if next(calls) == step:
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(placing.os, "replace", breaks)
        with pytest.raises(UserError, match="cannot be written"):
            put_page(open_bundle(here), f"{page}<!-- {step} -->", here / PAGE)
        open_bundle(here)  # whatever was written: the bundle is whole
        assert not [one for one in here.iterdir() if one.name.startswith(".")]
    monkeypatch.setattr(placing.os, "replace", real)
    put_page(open_bundle(here), page, here / PAGE)
    assert open_bundle(here).manifest == first.manifest


def test_a_page_never_takes_the_place_of_another_file(here, tmp_path):
    opened = open_bundle(here)
    for out, said in (
        (here / "manifest.json", "let it end in .html"),
        (here / "golden", "let it end in .html"),
        (tmp_path / "no" / "a.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            put_page(opened, "page", out)
    (tmp_path / "a.html").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        put_page(opened, "page", tmp_path / "a.html")
    listed = again(here, tmp_path / "b", {"docs/own.html": "mine"})
    with pytest.raises(UserError, match="is another file of the bundle"):
        put_page(listed, "page", listed.path / "docs" / "own.html")
    put_page(opened, "page", tmp_path / "beside.html")
    assert (tmp_path / "beside.html").read_text() == "page"
    open_bundle(here)


def test_folders_of_pictures(tmp_path):
    for name in ("b.png", "a.JPG", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [one.name for one in picture_files([tmp_path], 9)] == ["a.JPG", "b.png"]
    assert [one.name for one in picture_files([tmp_path / "b.png", tmp_path], 2)] == ["b.png", "a.JPG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        picture_files([tmp_path / "empty"], 9)
