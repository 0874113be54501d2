"""How an answer is judged: each data set's own rule, from text to a score between 0 and 1.

`VQA` follows the official evaluation of VQA v2 and TextVQA (github.com/GT-Vision-Lab/VQA): answers are brought to one
form (lower case, digits for number words, no articles, no punctuation, apostrophes in contractions) and the score is
min(n / 3, 1) for n annotators who gave the answer, averaged over the sets that leave one annotator out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Score = Callable[[str, Sequence[str]], float]
"""(what the model answered, the accepted answers or those of all annotators) -> 0 to 1."""

SHORT = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5's published evaluations put after each question."""


@dataclass(frozen=True)
class Protocol:
    """A rule by name. `description` is recorded with every measurement: how answers are judged and how it is asked.

    `binary`: questions are answered by yes or no, so that an F1 score of "yes" can be given.
    """

    name: str
    description: str
    score: Score
    binary: bool = False


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 when all of the answer is one of the accepted ones, space around it aside."""
    return float(answer.strip() in accepted)


def any_of(answer: str, accepted: Sequence[str]) -> float:
    """1 when it is one of the accepted ones after `normalised`."""
    return float(normalised(answer) in {normalised(one) for one in accepted})


def gqa(answer: str, accepted: Sequence[str]) -> float:
    """1 for the same words, letter case and a full stop at the end aside."""
    return float(answer.strip().rstrip(".").lower() in accepted)


def vqa(answer: str, annotators: Sequence[str]) -> float:
    """min(n / 3, 1) averaged over all sets of annotators but one; with a single annotator, 1 for the same answer."""
    given = [normalised(one) for one in annotators]
    said = normalised(answer)
    if len(given) == 1:
        return float(said == given[0])
    total = given.count(said)
    return sum(min((total - (one == said)) / 3.0, 1.0) for one in given) / len(given)


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """POPE's reading: the first sentence is "no" when it has the word no or not, otherwise "yes"."""
    words = answer.strip().partition(".")[0].replace(",", "").lower().split()
    said = "no" if "no" in words or "not" in words else "yes"
    return float(said in accepted)


EXACT = Protocol("exact", "all of the answer must be the expected text", exact)
ANY = Protocol("any", "one of the accepted answers, without regard to case, articles and punctuation", any_of)

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_WHOLE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
    "mustn't must've needn't o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {  # a word that lacks one of its apostrophes -> the word
    whole[:place] + whole[place + 1 :]: whole
    for whole in _WHOLE.split()
    for place, letter in enumerate(whole)
    if letter == "'"
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # one inside a number stays
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")


def normalised(answer: str) -> str:
    """The form in which the VQA evaluation compares answers."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number_comma = _COMMA_IN_NUMBER.search(text) is not None
    original = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_space or has_number_comma else " ")
    text = _PERIOD.sub("", text).lower()
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
