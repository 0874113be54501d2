"""The decode loop on a scripted model: what is handed out, and when it ends."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.runtime.generate import Generated, generate
from svdprune.runtime.sampling import Sampler, Sampling
from svdprune.runtime.stops import StopFilter

EOS = 9


class Script:
    """A prompt cache whose model says the given ids, one after the other."""

    def __init__(self, *ids: int, rows: int = 100) -> None:
        self.ids, self.rows, self.pushed = list(ids), rows, []

    def first(self) -> np.ndarray:
        return self._logits(self.ids[0])

    def push(self, token: int) -> np.ndarray:
        self.pushed.append(token)
        return self._logits(self.ids[len(self.pushed)])

    def room(self) -> bool:
        return len(self.pushed) < self.rows

    @staticmethod
    def _logits(token: int) -> np.ndarray:
        logits = np.zeros(10, np.float32)
        logits[token] = 1.0
        return logits


class Words:
    """A detokenizer with a fixed text for each id."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def push(self, token: int) -> str:
        return self.texts[token]

    def finish(self) -> str:
        return ""


def said(
    script: Script, texts: tuple[str, ...], limit: int = 8, stop: tuple[str, ...] = ()
) -> tuple[list[str], Generated]:
    result = Generated()
    pieces = generate(
        script, script.first(), Sampler(Sampling()), Words(*texts), StopFilter(stop), {EOS}, limit, result
    )
    return list(pieces), result


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        ((" red", " star"), "red star"),  # the space before the first word belongs to its token
        (("\n", "  red"), "red"),
        (("red", " \n"), "red \n"),  # what follows the first word is the answer's own
    ],
)
def test_whitespace_before_the_first_word_is_left_out(texts: tuple[str, ...], text: str) -> None:
    pieces, result = said(Script(0, 1, EOS), texts)
    assert "".join(pieces) == result.text == text
    assert result.ids == [0, 1, EOS]
    assert result.stopped == "eos"


def test_it_ends_at_the_limit_at_a_stop_string_and_when_the_context_is_full() -> None:
    assert said(Script(0, 1, 2, EOS), ("a", "b", "c"), limit=2)[1].stopped == "length"
    pieces, result = said(Script(0, 1, 2, EOS), ("a", "b.", "c"), stop=(".",))
    assert ("".join(pieces), result.stopped) == ("ab", "stop")
    assert said(Script(0, 1, 2, EOS, rows=1), ("a", "b", "c"))[1].text == "ab"


def test_an_end_token_is_not_fed_back() -> None:
    script = Script(0, EOS)
    said(script, ("a",))
    assert script.pushed == [0]
