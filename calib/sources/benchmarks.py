"""GQA, TextVQA, POPE and VQA v2 from local files in their published formats, LLaVA-1.5's prompt and each one's rule.

`gqa:PLACE`, `textvqa:PLACE`, `textvqa+ocr:PLACE`, `pope:PLACE`, `vqav2:PLACE`, where PLACE is a folder that holds the
annotations and the pictures, or the annotation file itself with the pictures in its folder or the one above.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from svdprune.calib.sources.base import Labelled, Listing, grouped, register
from svdprune.calib.sources.protocols import SHORT, Protocol, gqa, vqa, yes_no
from svdprune.runtime.errors import UserError

_SHORT_SAID = 'asked to "answer the question using a single word or phrase"'

GQA = Protocol("gqa", f"the same words as the answer; {_SHORT_SAID}", gqa)
TEXTVQA = Protocol("textvqa", f"VQA accuracy over ten annotators; {_SHORT_SAID}, without OCR text in the prompt", vqa)
TEXTVQA_OCR = Protocol(
    "textvqa+ocr", f"VQA accuracy over ten annotators; {_SHORT_SAID}, with the OCR tokens in the prompt", vqa
)
POPE = Protocol("pope", f"yes or no, read as POPE's evaluation reads it; {_SHORT_SAID}", yes_no, binary=True)
VQAV2 = Protocol("vqav2", f"VQA accuracy over ten annotators; {_SHORT_SAID}", vqa)


@register("gqa")
def list_gqa(rest: str, count: int, seed: int) -> Listing:
    """`testdev_balanced_questions.json` (else another `*questions*.json`), pictures `images/<imageId>.jpg`."""
    file = _file("gqa", rest, ("testdev_balanced_questions.json", "val_balanced_questions.json", "*questions*.json"))
    content = _json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not GQA's: it must be an object of questions by their id")
    rows = []
    for key, item in content.items():
        question, image, answer = _fields(file, f"question {key}", item, "question", "imageId", "answer")
        types = item.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        label = Labelled(question + SHORT, [answer], kind)
        rows.append((_picture(file, ("images", "."), f"{image}.jpg"), image, label))
    return Listing(grouped(rows), GQA, f"GQA, {file.name}; {GQA.description}")


@register("textvqa")
def list_textvqa(rest: str, count: int, seed: int) -> Listing:
    """`TextVQA_0.5.1_val.json`, pictures `train_images/<image_id>.jpg`; no OCR text in the prompt."""
    return _textvqa(rest, "textvqa", with_ocr=False)


@register("textvqa+ocr")
def list_textvqa_ocr(rest: str, count: int, seed: int) -> Listing:
    """The same with "Reference OCR token: ..." after each question, from `TextVQA_Rosetta_OCR_v0.2_val.json`."""
    return _textvqa(rest, "textvqa+ocr", with_ocr=True)


def _textvqa(rest: str, scheme: str, with_ocr: bool) -> Listing:
    file = _file(scheme, rest, ("TextVQA_*_val.json", "TextVQA_*.json"), without="Rosetta_OCR")
    ocr = _ocr(file) if with_ocr else {}
    rows = []
    for number, item in enumerate(_items(file, _json(file), "data", "TextVQA's"), 1):
        where = f"question {number}"
        question, image = _fields(file, where, item, "question", "image_id")
        answers = item.get("answers")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{file}: {where} has no answers: the test set has none, use the validation set")
        if with_ocr:
            if image not in ocr:
                raise UserError(f"the OCR file beside {file} has no tokens of picture {image}: get the same release")
            question += f"\nReference OCR token: {', '.join(ocr[image])}"
        label = Labelled(question + SHORT, [str(one) for one in answers])
        rows.append((_picture(file, ("train_images", "images", "."), f"{image}.jpg"), image, label))
    protocol = TEXTVQA_OCR if with_ocr else TEXTVQA
    return Listing(grouped(rows), protocol, f"TextVQA, {file.name}; {protocol.description}")


def _ocr(file: Path) -> dict[str, list[str]]:
    found = sorted(file.parent.glob("TextVQA_Rosetta_OCR_*_val.json")) or sorted(file.parent.glob("*Rosetta_OCR*.json"))
    if not found:
        raise UserError(
            f"textvqa+ocr needs TextVQA_Rosetta_OCR_v0.2_val.json beside {file.name}: put it there, or use textvqa:"
        )
    tokens: dict[str, list[str]] = {}
    for number, item in enumerate(_items(found[0], _json(found[0]), "data", "TextVQA's OCR"), 1):
        (image,) = _fields(found[0], f"entry {number}", item, "image_id")
        tokens[image] = [str(token) for token in item.get("ocr_tokens") or []]
    return tokens


@register("pope")
def list_pope(rest: str, count: int, seed: int) -> Listing:
    """`coco_pope_<kind>.json`, one object a line; pictures `val2014/COCO_val2014_*.jpg`. All kinds of a folder."""
    place = Path(rest).expanduser()
    files = [place] if place.is_file() else sorted(_folder("pope", rest).rglob("*pope_*.json*"))
    if not files:
        raise UserError(f"{rest} holds no coco_pope_random.json, _popular or _adversarial: give POPE's folder")
    rows = []
    for file in files:
        kind = file.stem.rpartition("pope_")[2]
        for number, line in enumerate(_text(file).splitlines(), 1):
            if not line.strip():
                continue
            item = _parsed(file, line, f", line {number}")
            text, image, label = _fields(file, f"line {number}", item, "text", "image", "label")
            if label not in ("yes", "no"):
                raise UserError(f"{file}: line {number} has the label {label!r}: POPE's are yes and no")
            question = Labelled(text + SHORT, [label], kind)
            rows.append((_picture(file, ("val2014", "images", "."), image), image, question))
    return Listing(grouped(rows), POPE, f"POPE, {', '.join(file.name for file in files)}; {POPE.description}")


@register("vqav2")
def list_vqav2(rest: str, count: int, seed: int) -> Listing:
    """`*OpenEnded*questions.json` and `*annotations.json`, pictures `val2014/COCO_val2014_<12 digits>.jpg`."""
    file = _file("vqav2", rest, ("*OpenEnded*val2014*questions.json", "*OpenEnded*questions.json"))
    questions = _json(file)
    subset = str(questions.get("data_subtype", "val2014")) if isinstance(questions, dict) else "val2014"
    notes = sorted(file.parent.glob(f"*{subset}*annotations.json"))
    if not notes:
        raise UserError(f"{file.parent} holds no v2_mscoco_{subset}_annotations.json: the questions have no answers")
    labels: dict[str, tuple[list[str], str | None]] = {}
    for number, item in enumerate(_items(notes[0], _json(notes[0]), "annotations", "VQA v2's"), 1):
        (key,) = _fields(notes[0], f"annotation {number}", item, "question_id")
        answers = item.get("answers")
        if not isinstance(answers, list) or not all(isinstance(one, dict) and "answer" in one for one in answers):
            raise UserError(f"{notes[0]}: annotation {number} has no list of answers")
        labels[key] = ([str(one["answer"]) for one in answers], item.get("answer_type"))
    rows = []
    for number, item in enumerate(_items(file, questions, "questions", "VQA v2's"), 1):
        question, image, key = _fields(file, f"question {number}", item, "question", "image_id", "question_id")
        if key not in labels:
            raise UserError(f"{notes[0]} has no answers to question {key} of {file.name}: get both of one split")
        name = f"COCO_{subset}_{int(image):012d}.jpg"
        rows.append((_picture(file, (subset, "images", "."), name), name, Labelled(question + SHORT, *labels[key])))
    return Listing(grouped(rows), VQAV2, f"VQA v2, {file.name}; {VQAV2.description}")


def _folder(scheme: str, rest: str) -> Path:
    if not rest:
        raise UserError(f"{scheme}: needs a folder: give {scheme}:FOLDER, with the annotations and the pictures")
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {rest}: give {scheme}:FOLDER, with the annotations and the pictures")
    return folder


def _file(scheme: str, rest: str, patterns: tuple[str, ...], without: str | None = None) -> Path:
    """The annotation file: given, or the first that fits the first pattern that any fits."""
    if Path(rest).expanduser().is_file():
        return Path(rest).expanduser()
    folder = _folder(scheme, rest)
    for pattern in patterns:
        found = sorted(place for place in folder.rglob(pattern) if without is None or without not in place.name)
        if found:
            return found[0]
    raise UserError(f"{rest} holds no {patterns[0]}: give the folder of the published files, or the file itself")


def _picture(file: Path, folders: tuple[str, ...], name: str) -> Path:
    """Where a picture lies: in one of the folders beside the annotations or one level up; else where it should be."""
    for root in (file.parent, file.parent.parent):
        for folder in folders:
            if (root / folder / name).is_file():
                return root / folder / name
    return file.parent / folders[0] / name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): get it again") from error


def _json(file: Path) -> Any:
    return _parsed(file, _text(file), "")


def _parsed(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}{where} is not JSON ({error}): get it again") from error


def _items(file: Path, content: Any, name: str, whose: str) -> list[Any]:
    items = content.get(name) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise UserError(f"{file} is not {whose}: it has no list {name!r}")
    return items


def _fields(file: Path, where: str, item: Any, *names: str) -> tuple[str, ...]:
    """Fields of a record as text; ids may be numbers."""
    found = []
    for name in names:
        value = item.get(name) if isinstance(item, dict) else None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f"{file}: {where} has no {name!r}: it is not in the published format")
        found.append(str(value))
    return tuple(found)
