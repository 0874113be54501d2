"""Measured tables in Markdown files: a command replaces what stands between its two markers."""

from __future__ import annotations

import os
from pathlib import Path


def write_between(file: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- name -->` and `<!-- /name -->` in `file`, written beside and renamed.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = file.read_text(encoding="utf-8")
    if content.count(first) != 1 or content.count(last) != 1 or content.index(first) > content.index(last):
        raise ValueError(f"{file} needs the markers {first} and {last}, once each")
    before, rest = content.split(first)
    after = rest.split(last)[1]
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}", encoding="utf-8")
    os.replace(beside, file)
