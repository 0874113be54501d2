"""Which blocks to leave in float: each is quantised alone and measured, then the worst are left out, one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from svdprune.calib.quantise.judge import Change

OVERLAP = 0.95  # of the kept sets, wanted on the mean
COSINE = 0.995  # of the tokens, wanted on the mean


@dataclass(frozen=True)
class BlockChange:
    """What one block alone changes, all others in float."""

    block: str
    change: Change


@dataclass(frozen=True)
class Choice:
    """The blocks left in float, what the rest of them changes, and whether that is within the targets."""

    float_blocks: list[str]
    change: Change
    met: bool


def damage(change: Change) -> float:
    """What was lost, in units of what the targets allow: 2 where both are just met."""
    return (1 - change.overlap) / (1 - OVERLAP) + (1 - change.cosine) / (1 - COSINE)


def meets(change: Change) -> bool:
    """Whether a change is within both targets."""
    return change.overlap >= OVERLAP and change.cosine >= COSINE


def sweep(
    names: Sequence[str],
    measure: Callable[[Collection[str]], Change],
    report: Callable[[float], None] = lambda share: None,
) -> list[BlockChange]:
    """Quantise one block at a time.

    Args:
        names: all blocks. measure: from the blocks left in float to the change. report: called with the share done.

    Returns:
        All blocks, the one that does most damage first; of two equal ones, the later in the graph.
    """
    found = []
    for place, name in enumerate(names):
        report(place / len(names))
        change = measure([other for other in names if other != name])
        found.append((damage(change), place, BlockChange(name, change)))
    return [item for _, _, item in sorted(found, key=lambda one: one[:2], reverse=True)]


def choose(
    order: Sequence[BlockChange],
    measure: Callable[[Collection[str]], Change],
    report: Callable[[float], None] = lambda share: None,
) -> Choice:
    """Leave out the worst blocks, one more at a time, until the targets are met, up to half of all.

    Where half of them do not do, the least damaging of the choices tried, with `met` false.
    """
    tried: list[Choice] = []
    most = len(order) // 2
    for count in range(most + 1):
        report(count / (most + 1))
        left_out = [item.block for item in order[:count]]
        change = measure(left_out)
        tried.append(Choice(left_out, change, meets(change)))
        if tried[-1].met:
            return tried[-1]
    return min(tried, key=lambda choice: damage(choice.change))
