"""A folder of pictures, with a `questions.jsonl` or without.

`questions.jsonl` holds one JSON object a line: {"image": "name in the folder", "question": "...", and optionally
"answer": "..." or "answers": ["...", ...], "kind": "..."}. Then the pictures it names are the source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from svdprune.calib.sources.base import Labelled, Listing, file_entry, grouped, register
from svdprune.calib.sources.protocols import ANY
from svdprune.runtime.errors import UserError

QUESTIONS = "questions.jsonl"


@register("folder")
def list_folder(rest: str, count: int, seed: int) -> Listing:
    """Every picture under the folder, by name, or those that `questions.jsonl` names."""
    folder = Path(rest).expanduser()
    if folder.is_file():
        raise UserError(f"{rest} is a file: give the folder that holds it")
    if not folder.is_dir():
        raise UserError(f"there is no folder {rest}: give a folder of pictures")
    if (folder / QUESTIONS).is_file():
        rows = [_row(folder, number, line) for number, line in _lines(folder / QUESTIONS)]
        if not rows:
            raise UserError(f"{folder / QUESTIONS} holds no questions: remove it, or give one JSON object a line")
        return Listing(grouped(rows), ANY, f"pictures and questions of {folder.name}/{QUESTIONS}; {ANY.description}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = sorted(
        place.relative_to(folder).as_posix()
        for place in folder.rglob("*")
        if place.suffix.lower() in suffixes and place.is_file() and not place.name.startswith(".")
    )
    entries = [file_entry(folder / name, [], name) for name in names]
    return Listing(entries, ANY, f"pictures of {folder.name}, without labels")


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): it must be UTF-8 text") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _row(folder: Path, number: int, line: str) -> tuple[Path, str, Labelled]:
    where = f"{folder / QUESTIONS}, line {number}"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): give one JSON object a line") from error
    if not isinstance(content, dict):
        raise UserError(f'{where} is not a JSON object: give {{"image": ..., "question": ...}}')
    for name in ("image", "question"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise UserError(f"{where} has no {name!r}: each line needs an image and a question, as text")
    kind = content.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: kind is {kind!r}, it must be text")
    question = Labelled(content["question"], labels(content, where), kind)
    return folder / content["image"], content["image"], question


def labels(content: dict[str, Any], where: str) -> list[str] | None:
    """`answer` or `answers` of a record, None when it has neither."""
    found = content.get("answers", content.get("answer"))
    if found is None:
        return None
    held = [found] if isinstance(found, str) else found
    if not isinstance(held, list) or not held or not all(isinstance(one, str) for one in held):
        raise UserError(f"{where}: the answer is {found!r}, it must be text or a list of texts")
    return list(held)
