"""Sources of pictures: folders, scenes, easy-vqa; sampling, broken pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdprune.calib.sources import DEFAULT_QUESTIONS, open_source, pictures, schemes
from svdprune.calib.sources.protocols import exact, gqa, normalised, vqa, yes_no
from svdprune.runtime.errors import UserError


def draw(path: Path, shade: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 100, 50)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        draw(tmp_path / f"{number}.png", number * 20)
    return tmp_path


def names(spec: str | Path, limit: int = 100, seed: int = 0) -> list[str]:
    return [sample.name for sample in open_source(str(spec), limit=limit, seed=seed).samples()]


def test_a_folder_is_sampled_by_seed_and_every_picture_is_asked_the_default_questions(folder: Path) -> None:
    draw(folder / "below" / "deep.jpg")
    (folder / "notes.txt").write_text("no picture")
    draw(folder / ".hidden.png")
    assert sorted(names(folder)) == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "below/deep.jpg"]
    assert names(folder, 3) == names(folder, 3)
    assert names(folder, 3) == names(folder)[:3]
    assert any(names(folder, 3) != names(folder, 3, seed) for seed in (1, 2, 3))
    source = open_source(str(folder), limit=2, seed=0)
    samples = list(source.samples())
    assert [q.text for q in samples[0].questions] == list(DEFAULT_QUESTIONS)
    assert samples[0].questions[0].answers is None
    assert samples[0].image.mode == "RGB"
    assert source.skipped == 5 and source.broken == []


def test_broken_pictures_are_named_replaced_and_not_fatal(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    (folder / "3.png").write_bytes(b"")
    source = open_source(str(folder), limit=6, seed=0)
    assert sorted(s.name for s in source.samples()) == ["0.png", "2.png", "4.png", "5.png"]
    list(source.samples())  # a second walk does not count them twice
    assert sorted(name for name, _ in source.broken) == ["1.png", "3.png"]
    assert "3.png is empty" in source.describe_broken()
    with pytest.raises(UserError, match=r"has 4 usable pictures of 6 and 5 are needed: 2 could not be used: .*\.png"):
        pictures(str(folder), at_least=5, limit=6, seed=0)
    assert len(pictures(str(folder), at_least=4, limit=6, seed=0)) == 4


def test_too_few_pictures_are_told_before_any_is_opened(folder: Path) -> None:
    with pytest.raises(UserError, match="has 6 pictures and 7 are needed"):
        open_source(str(folder), limit=10, seed=0, at_least=7)


def test_progress_is_reported(folder: Path) -> None:
    seen: list[float | None] = []
    pictures(str(folder), at_least=1, limit=4, seed=0, progress=lambda step, share: seen.append(share))
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_questions_of_a_folder(folder: Path) -> None:
    rows = [
        {"image": "0.png", "question": "What colour?", "answer": "Red", "kind": "colour"},
        {"image": "0.png", "question": "How many?", "answers": ["2", "two"]},
        {"image": "4.png", "question": "Why?"},
        {"image": "gone.png", "question": "Where?"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(str(folder), limit=9, seed=0)
    found = {sample.name: sample.questions for sample in source.samples()}
    assert set(found) == {"0.png", "4.png"}
    first, second = found["0.png"]
    assert (first.text, first.answers, first.kind) == ("What colour?", ["Red"], "colour")
    assert second.answers == ["2", "two"] and second.kind is None
    assert found["4.png"][0].answers is None
    assert [name for name, _ in source.broken] == ["gone.png"]
    assert source.protocol.score(" The red.", ["Red"]) == 1.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"image": "0.png"}', "line 2 has no 'question'"),
        ('{"image": "0.png", "question": " "}', "line 2 has no 'question'"),
        ('{"image": "0.png", "question": "x", "answer": 3}', "line 2: the answer is 3"),
        ('{"image": "0.png", "question": "x", "answers": []}', "line 2: the answer is"),
        ('{"image": "0.png", "question": "x", "kind": 3}', "line 2: kind is 3"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: str, said: str) -> None:
    (folder / "questions.jsonl").write_text('{"image": "0.png", "question": "x"}\n' + line)
    with pytest.raises(UserError, match=said):
        open_source(str(folder), limit=1, seed=0)


def test_what_is_not_a_source_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec, said in [
        ("easyvqa", r"did you mean easy-vqa\?"),
        ("scenez:x", r"'scenez' is not known \(did you mean scenes\?\)"),
        (str(tmp_path / "gone"), "there is no folder"),
        (str(empty), "holds no pictures"),
        (str(draw(tmp_path / "one.png")), "is a file: give the folder"),
        ("hf:", "needs a data set"),
        ("pope:", "needs a folder"),
        ("easy-vqa:middle", "no split 'middle'"),
    ]:
        with pytest.raises(UserError, match=said):
            open_source(spec, limit=1, seed=0)
    with pytest.raises(UserError, match="0 pictures are too few"):
        open_source("scenes", limit=0, seed=0)
    assert {"folder", "scenes", "easy-vqa", "hf", "gqa", "textvqa", "pope", "vqav2"} <= set(schemes())


def test_scenes_are_drawn_with_their_answers_and_a_series_is_its_own() -> None:
    one, again, other, seeded = (
        {s.name: s for s in open_source(spec, limit=3, seed=seed).samples()}
        for spec, seed in (("scenes", 0), ("scenes", 0), ("scenes:calibration", 0), ("scenes", 1))
    )
    assert set(one) == {"held-out:0", "held-out:1", "held-out:2"}
    for name, sample in one.items():
        assert np.array_equal(np.asarray(sample.image), np.asarray(again[name].image))
        assert all(q.answers and q.kind for q in sample.questions)
    assert not set(one) & set(other) and not set(one) & set(seeded)
    pixels = [np.asarray(s["held-out:0" if s is one else n].image) for s in (one, other) for n in list(s)[:1]]
    assert not np.array_equal(*pixels)


def test_labels_can_be_left_aside() -> None:
    source = open_source("scenes", limit=2, seed=0, labels=False)
    assert all(q.answers is None and q.kind for sample in source.samples() for q in sample.questions)
    assert source.description.endswith("labels left aside")


def test_easy_vqa_comes_from_its_package() -> None:
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    source = open_source("easy-vqa", limit=5, seed=0)
    samples = list(source.samples())
    assert len(samples) == 5 and source.skipped == 995
    kinds = {q.kind for s in samples for q in s.questions}
    assert kinds <= {"shape", "color", "yes/no"} and "yes/no" in kinds
    assert all(s.image.size == (64, 64) for s in samples)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(UserError, match=r"the source easy-vqa needs the package `easy_vqa`.*svdprune\[data\]"):
        open_source("easy-vqa", limit=1, seed=0)


def test_answers_are_judged_by_each_data_sets_rule() -> None:
    assert exact(" red\n", ["red"]) == 1.0 and exact("Red", ["red"]) == 0.0
    assert gqa("Yes.", ["yes"]) == 1.0 and gqa("the yes", ["yes"]) == 0.0
    assert yes_no("No, there is not.", ["no"]) == 1.0 and yes_no("There is. No doubt", ["yes"]) == 1.0
    assert yes_no("It is not there", ["no"]) == 1.0
    assert normalised("The Two dogs, and isnt it 3.5?") == "2 dogs and isn't it 3.5"
    assert normalised("1,000 m.") == "1000 m"
    assert normalised("couldn'tve") == "couldn't've"


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_averaged_over_the_sets_of_nine(agree: int, score: float) -> None:
    assert vqa("Net", ["net"] * agree + ["netting"] * (10 - agree)) == pytest.approx(score)
