"""A Hugging Face data set: on disk (`save_to_disk`, parquet or arrow files) or on the hub, by the package `datasets`.

`hf:PLACE[:SPLIT]`. The columns are found by their names and types: the picture is the first column of the type Image,
else one called image, picture or img; question, answer or answers, and kind are found by these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from svdprune.calib.sources.base import Entry, Labelled, Listing, register
from svdprune.calib.sources.protocols import ANY
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.preprocess import open_image

PICTURE, QUESTION, ANSWER, KIND = ("image", "picture", "img"), ("question",), ("answers", "answer"), ("kind",)
SPLIT_ORDER = ("test", "validation", "train")  # without a split in the spec, the first of these that is there


@register("hf")
def list_hub(rest: str, count: int, seed: int) -> Listing:
    """A split of the data set at `rest`."""
    if not rest:
        raise UserError("hf: needs a data set: give hf:FOLDER or hf:OWNER/NAME, and :SPLIT where there are several")
    place, split = _parted(rest)
    datasets = require("datasets", "data", "a Hugging Face data set")
    datasets.disable_progress_bars()
    if Path(place).expanduser().is_dir():
        table, split = _on_disk(datasets, Path(place).expanduser(), split)
    else:
        table, split = _from_hub(datasets, place, split)
    columns = {name.lower(): name for name in table.column_names}
    image = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    image = image or _column(columns, PICTURE)
    if image is None:
        raise UserError(f"{place} has no column of pictures: its columns are {', '.join(table.column_names)}")
    table = table.cast_column(image, datasets.Image(decode=False))  # decoded here, so that a broken one can be counted
    asked, answers, kind = (_column(columns, names) for names in (QUESTION, ANSWER, KIND))
    entries = [_entry(table, number, image, asked, answers, kind) for number in range(len(table))]
    labels = f"questions of the column {asked}" if asked else "without questions"
    return Listing(entries, ANY, f"{place}, split {split}, {labels}; {ANY.description}")


def _parted(rest: str) -> tuple[str, str | None]:
    """Place and split; a place may hold a colon only before a slash (a drive's letter, for one)."""
    place, found, split = rest.rpartition(":")
    return (place, split) if found and split and "/" not in split else (rest, None)


def _on_disk(datasets: Any, folder: Path, split: str | None) -> tuple[Any, str]:
    """What `save_to_disk` wrote, or the parquet or arrow files in a folder."""
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            held = datasets.load_from_disk(str(folder))
        else:
            held = None
            for suffix, reader in (("parquet", "parquet"), ("arrow", "arrow")):
                files = sorted(str(place) for place in folder.rglob(f"*.{suffix}"))
                if files:
                    held = datasets.load_dataset(reader, data_files=_by_split(files))
                    break
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"the data set in {folder} cannot be read ({error}): get it again") from error
    if held is None:
        raise UserError(
            f"{folder} holds no data set: neither save_to_disk()'s files nor parquet or arrow files were found; "
            "for a folder of pictures leave out hf:"
        )
    return _one_split(held, split, str(folder), "all" if not isinstance(held, dict) else "")


def _by_split(files: list[str]) -> dict[str, list[str]]:
    """Files named as the hub names them, `test-00000-of-00001.parquet`, by split; all others are "train"."""
    found: dict[str, list[str]] = {}
    for file in files:
        head = Path(file).name.partition("-")[0].partition(".")[0]
        found.setdefault(head if head in SPLIT_ORDER else "train", []).append(file)
    return found


def _from_hub(datasets: Any, name: str, split: str | None) -> tuple[Any, str]:
    try:
        held = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {name} cannot be loaded ({error}): download it elsewhere and give its folder, hf:FOLDER"
        ) from error
    return _one_split(held, split, name, "")


def _one_split(held: Any, split: str | None, place: str, single: str) -> tuple[Any, str]:
    if not isinstance(held, dict):
        if split is not None:
            raise UserError(f"{place} has one split only: leave out :{split}")
        return held, single
    if split is None:
        split = next((name for name in SPLIT_ORDER if name in held), next(iter(held)))
    if split not in held:
        raise UserError(f"{place} has no split {split!r}: choose one of {', '.join(held)}")
    return held[split], split


def _column(columns: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _entry(table: Any, number: int, image: str, asked: str | None, answers: str | None, kind: str | None) -> Entry:
    def load() -> tuple[Image.Image, list[Labelled]]:
        row = table[number]
        held = row[image]
        source = None if held is None else held.get("bytes") or held.get("path")
        if source is None:
            raise UserError(f"row {number} has no picture")
        picture = open_image(source)
        if asked is None:
            return picture, []
        texts = row[asked] if isinstance(row[asked], list) else [row[asked]]
        told = row[answers] if answers is not None else None
        each = told if isinstance(row[asked], list) and isinstance(told, list) else [told] * len(texts)
        group = str(row[kind]) if kind is not None and row[kind] is not None else None
        return picture, [
            Labelled(str(text), _answers(one), group) for text, one in zip(texts, each, strict=True) if text
        ]

    return Entry(f"row {number}", load)


def _answers(told: Any) -> list[str] | None:
    """One answer or several, as texts or as records with the field "answer" (VQA's form)."""
    if told is None:
        return None
    several = told if isinstance(told, list) else [told]
    found = [str(one["answer"]) if isinstance(one, dict) else str(one) for one in several]
    return found or None
