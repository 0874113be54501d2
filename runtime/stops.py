"""Stop strings: text that ends an answer and is not part of it."""

from __future__ import annotations

from collections.abc import Sequence

from svdprune.runtime.errors import UserError


def check_stops(stops: str | Sequence[str]) -> list[str]:
    """One string or several, as a list.

    Raises:
        UserError: one is empty or not text.
    """
    listed = [stops] if isinstance(stops, str) else list(stops)
    if not all(isinstance(stop, str) and stop for stop in listed):
        raise UserError("a stop string is empty or not text: leave it out")
    return listed


class StopFilter:
    """Passes pieces of text on until a stop string appears, holding back an end that could be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """The text that is certain to be part of the answer; ``hit`` is set once a stop string was met."""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.hit, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when the answer ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
