"""The licence of a checkpoint's weights, as its own files name it."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
_FIELD = re.compile(r"^(license(?:_name|_link)?):[ \t]*['\"]?(.*?)['\"]?[ \t]*$", re.MULTILINE)
LONGEST = 120  # characters of a licence file's first line


def weights_licence(folder: Path) -> str | None:
    """From the head of the model card, or the first line of a licence file; None where neither says."""
    card = folder / "README.md"
    if card.is_file() and (head := _HEAD.match(_text(card))):
        fields = dict(_FIELD.findall(head[1]))
        named = fields.get("license")
        if named in (None, "", "other"):  # the hub's word for a licence that it has no name for
            named = fields.get("license_name")
        if named:
            link = fields.get("license_link")
            return f"{named} (the model card)" + (f", {link}" if link else "")
    for place in sorted(folder.glob("LICEN[CS]E*")):
        if place.is_file() and (lines := _text(place).split("\n")):
            first = next((line.strip() for line in lines if line.strip()), "unnamed")
            return f"{first[:LONGEST]} (the file {place.name})"
    return None


def _text(place: Path) -> str:
    return place.read_text(encoding="utf-8", errors="replace")
