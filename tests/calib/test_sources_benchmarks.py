"""GQA, TextVQA, POPE and VQA v2 read from small files of their published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svdprune.calib.sources import Source, open_source
from svdprune.calib.sources.base import Sample
from svdprune.calib.sources.protocols import SHORT
from svdprune.runtime.errors import UserError


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(path)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(spec: str) -> tuple[Source, dict[str, Sample]]:
    source = open_source(spec, limit=10, seed=0)
    return source, {sample.name: sample for sample in source.samples()}


def gqa_question(image: str, question: str, answer: str, structural: str) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "bag (1)"}],
        "entailed": [],
        "equivalent": ["1"],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": None},
        "answer": answer,
        "semanticStr": "",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "existC", "semantic": "obj", "structural": structural},
        "fullAnswer": "",
    }


def test_gqa(tmp_path: Path) -> None:
    questions = {
        "201307251": gqa_question("n161313", "Is it overcast?", "no", "verify"),
        "201307252": gqa_question("n161313", "What is it?", "bag", "query"),
        "201640614": gqa_question("n235859", "Who is wearing the dress?", "woman", "query"),
    }
    write(tmp_path / "questions" / "testdev_balanced_questions.json", questions)
    write(tmp_path / "questions" / "train_all_questions.json", "not read")
    draw(tmp_path / "images" / "n161313.jpg")
    source, found = read(f"gqa:{tmp_path}")
    assert [(q.text, q.answers, q.kind) for q in found["n161313"].questions] == [
        ("Is it overcast?" + SHORT, ["no"], "verify"),
        ("What is it?" + SHORT, ["bag"], "query"),
    ]
    assert [name for name, _ in source.broken] == ["n235859"]
    assert source.protocol.name == "gqa" and source.protocol.score("No", ["no"]) == 1.0
    assert "single word or phrase" in source.listing.description
    _, by_file = read(f"gqa:{tmp_path / 'questions' / 'testdev_balanced_questions.json'}")
    assert set(by_file) == {"n161313"}


def textvqa(folder: Path) -> None:
    base = {
        "image_classes": ["Clock"],
        "flickr_original_url": "",
        "image_width": 30,
        "image_height": 20,
        "set_name": "val",
    }
    data = [
        {**base, "question": "what time is it?", "image_id": "003a8ae2ef43b901", "question_id": 34602,
         "question_tokens": ["what"], "answers": ["3:30"] * 7 + ["half past 3"] * 2 + ["none"]},
    ]  # fmt: skip
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": data})
    draw(folder / "train_images" / "003a8ae2ef43b901.jpg")


def test_textvqa_without_and_with_ocr_text(tmp_path: Path) -> None:
    textvqa(tmp_path)
    source, found = read(f"textvqa:{tmp_path}")
    (question,) = found["003a8ae2ef43b901"].questions
    assert question.text == "what time is it?" + SHORT
    assert "without OCR" in source.listing.description
    assert question.answers is not None and len(question.answers) == 10
    assert source.protocol.score("3:30", question.answers) == 1.0
    assert source.protocol.score("half past 3", question.answers) == pytest.approx(0.6)
    with pytest.raises(UserError, match="needs TextVQA_Rosetta_OCR"):
        open_source(f"textvqa+ocr:{tmp_path}", limit=1, seed=0)
    ocr = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["ROLEX", "12"], "ocr_info": []}]
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    source, found = read(f"textvqa+ocr:{tmp_path}")
    (question,) = found["003a8ae2ef43b901"].questions
    assert question.text == "what time is it?\nReference OCR token: ROLEX, 12" + SHORT
    assert "with the OCR tokens" in source.listing.description
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": []})
    with pytest.raises(UserError, match="no tokens of picture 003a8ae2ef43b901"):
        open_source(f"textvqa+ocr:{tmp_path}", limit=1, seed=0)


def test_pope(tmp_path: Path) -> None:
    picture = "COCO_val2014_000000310196.jpg"
    line = {"question_id": 1, "image": picture, "text": "Is there a snowboard in the image?", "label": "yes"}
    for kind in ("random", "popular", "adversarial"):
        lines = [line, {**line, "question_id": 2, "text": "Is there a backpack in the image?", "label": "no"}]
        write(tmp_path / "output" / "coco" / f"coco_pope_{kind}.json", "\n".join(map(json.dumps, lines)) + "\n")
    draw(tmp_path / "output" / "val2014" / picture)
    source, found = read(f"pope:{tmp_path}")
    assert [q.kind for q in found[picture].questions] == ["adversarial"] * 2 + ["popular"] * 2 + ["random"] * 2
    assert [q.answers for q in found[picture].questions][:2] == [["yes"], ["no"]]
    assert source.protocol.binary
    _, one = read(f"pope:{tmp_path / 'output' / 'coco' / 'coco_pope_random.json'}")
    assert [q.kind for q in one[picture].questions] == ["random"] * 2
    write(tmp_path / "bad" / "coco_pope_random.json", json.dumps({**line, "label": "maybe"}))
    with pytest.raises(UserError, match="line 1 has the label 'maybe'"):
        open_source(f"pope:{tmp_path / 'bad'}", limit=1, seed=0)


def vqav2(folder: Path) -> tuple[Path, Path]:
    answers = [
        {"answer": "net" if n < 2 else "netting", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)
    ]
    info = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    questions = write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**info, "task_type": "Open-Ended",
         "questions": [{"image_id": 262148, "question": "What is behind him?", "question_id": 262148000}]},
    )  # fmt: skip
    annotation = {"question_type": "what is", "multiple_choice_answer": "netting", "answers": answers,
                  "image_id": 262148, "answer_type": "other", "question_id": 262148000}  # fmt: skip
    notes = write(folder / "v2_mscoco_val2014_annotations.json", {**info, "annotations": [annotation]})
    return questions, notes


def test_vqav2(tmp_path: Path) -> None:
    _, notes = vqav2(tmp_path)
    draw(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg")
    source, found = read(f"vqav2:{tmp_path}")
    (question,) = found["COCO_val2014_000000262148.jpg"].questions
    assert (question.text, question.kind) == ("What is behind him?" + SHORT, "other")
    assert question.answers is not None
    assert source.protocol.score("Net.", question.answers) == pytest.approx(0.6)
    write(notes, {"annotations": []})
    with pytest.raises(UserError, match="no answers to question 262148000"):
        open_source(f"vqav2:{tmp_path}", limit=1, seed=0)
    notes.unlink()
    with pytest.raises(UserError, match=r"holds no v2_mscoco_val2014_annotations\.json"):
        open_source(f"vqav2:{tmp_path}", limit=1, seed=0)


@pytest.mark.parametrize(
    ("scheme", "name", "content", "said"),
    [
        ("gqa", "val_balanced_questions.json", "[1]", "is not GQA's"),
        ("gqa", "val_balanced_questions.json", '{"1": {"question": "x"}}', "question 1 has no 'imageId'"),
        ("gqa", "val_balanced_questions.json", "{", "is not JSON"),
        ("textvqa", "TextVQA_0.5.1_val.json", "{}", "is not TextVQA's"),
        ("textvqa", "TextVQA_0.5.1_test.json", '{"data": [{"question": "x", "image_id": "y"}]}', "has no answers"),
        ("pope", "coco_pope_random.json", '{"text": "x"}', "line 1 has no 'image'"),
        ("pope", "coco_pope_random.json", "\nx", "line 2 is not JSON"),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "{}", "the questions have no answers"),
        ("vqav2", "unrelated.json", "{}", "holds no"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, scheme: str, name: str, content: str, said: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=said):
        open_source(f"{scheme}:{tmp_path}", limit=1, seed=0)
