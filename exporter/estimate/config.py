"""The config files of a model, and nothing else of it: no weights are fetched or read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdprune.exporter.estimate.families import read_model
from svdprune.exporter.estimate.shapes import Model
from svdprune.exporter.estimate.towers import Picture
from svdprune.exporter.source import fetch, place_of
from svdprune.runtime.errors import UserError

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"


def load_model(model: str, revision: str | None = None, *, picture: Picture = None, crops: int | None = None) -> Model:
    """The sizes of `model`: the shipped one, an alias, a folder, or a hub id of which two small files are fetched.

    Raises:
        UserError: nothing of that name, no config.json there, or a config that the estimate cannot read.
    """
    place = place_of(model)
    if isinstance(place, str):
        name, folder = place, fetch(place, revision, [CONFIG, PREPROCESSOR, PROCESSOR])
    else:
        name, folder = model if place.name == model else place.resolve().name, place
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}: give a folder that has a {CONFIG}, a hub id or an alias")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name if isinstance(place, str) else folder} has no {CONFIG}: an estimate is made from it")
    return read_model(name, _json(folder / CONFIG), _preprocessor(folder), picture=picture, crops=crops)


def _preprocessor(folder: Path) -> Mapping[str, Any] | None:
    """The settings of the image processor: a file of its own, or a part of the processor's."""
    if (folder / PREPROCESSOR).is_file():
        return _json(folder / PREPROCESSOR)
    if (folder / PROCESSOR).is_file():
        part = _json(folder / PROCESSOR).get("image_processor")
        return part if isinstance(part, dict) else None
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content
