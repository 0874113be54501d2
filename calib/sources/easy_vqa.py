"""easy-vqa (PyPI, MIT): 64 x 64 drawings of one shape, with about nine questions each and 13 possible answers."""

from __future__ import annotations

from pathlib import Path

from svdprune.calib.sources.base import Labelled, Listing, grouped, register
from svdprune.calib.sources.protocols import ANY
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require

SPLITS = ("test", "train")


@register("easy-vqa")
def list_easy_vqa(rest: str, count: int, seed: int) -> Listing:
    """The split `rest`: "test" (when empty) or "train"."""
    split = rest or SPLITS[0]
    if split not in SPLITS:
        raise UserError(f"easy-vqa has no split {split!r}: choose {' or '.join(SPLITS)}")
    package = require("easy_vqa", "data", "the source easy-vqa")
    asked, answers, images = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()
    rows = [
        (Path(paths[image]), f"{split}/{image}", Labelled(question, [answer], _kind(answer)))
        for question, answer, image in zip(asked, answers, images, strict=True)
    ]
    return Listing(grouped(rows), ANY, f"easy-vqa, split {split}; {ANY.description}")


def _kind(answer: str) -> str:
    """The package names no kinds; its answers fall into three."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"
