"""What a selector is asked to do, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from svdprune.exporter.selection.registry import selector_entry
from svdprune.runtime.errors import UserError

MIN_BLOCK = 64  # columns iterated together at least: a small rank with a wide block needs fewer iterations
VARIANCE_BLOCK = 64  # columns where the rank is each picture's own


@dataclass(frozen=True)
class SelectorConfig:
    """A selector by name and its settings; those of leverage are ignored by selectors that do not begin with it.

    Attributes:
        name: one of `selector_names()`.
        rank: r, the singular directions counted by the leverage score; ignored when `variance` is given.
        variance: the paper's rule instead of a fixed rank: for each picture, the fewest directions that hold this share
            of the sum of squared singular values, in (0, 1]; at most half the block.
        block: columns iterated together; None for `max(64, 4 rank)`, or 64 with `variance`. Never more than min(T, D),
            which is exact.
        iterations: rounds of power iteration, each a product with F and one with F^T; None for 2, or 3 when the block
            has fewer than 3 columns for each direction wanted (measured: docs/fidelity.md).
        centre: subtract the mean token first.
        seed: of the random start of `leverage` (when there is no calibrated one) and of `random`.
    """

    name: str = "leverage"
    rank: int = 16
    variance: float | None = None
    block: int | None = None
    iterations: int | None = None
    centre: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        selector_entry(self.name)
        for field, value in (("rank", self.rank), ("block", self.block), ("iterations", self.iterations)):
            if value is not None and (not _is_integer(value) or value < 1):
                raise UserError(f"{field} must be a whole number of 1 or more, not {value!r}")
        if not _is_integer(self.seed) or self.seed < 0:
            raise UserError(f"seed must be a whole number of 0 or more, not {self.seed!r}")
        if self.variance is not None:
            if not isinstance(self.variance, int | float) or not 0.0 < self.variance <= 1.0:
                raise UserError(f"variance is a share above 0 and up to 1 (0.9 is 90 %), not {self.variance!r}")
            if self.block is not None and self.block < 2:
                raise UserError("a variance threshold needs a block of 2 columns or more: leave out the block")
        elif self.block is not None and self.block < self.rank:
            raise UserError(
                f"block {self.block} cannot hold rank {self.rank}: give a block of at least {2 * self.rank}, or none"
            )

    @property
    def needs_cls_attention(self) -> bool:
        """Whether the [CLS] token's attention row (B, T) must be given beside the features."""
        return selector_entry(self.name).needs_cls_attention

    @property
    def by_leverage(self) -> bool:
        """Whether the selector begins with leverage scores, and so has their settings."""
        return selector_entry(self.name).by_leverage

    def columns(self, tokens: int, channels: int) -> int:
        """b, the columns of the block for features of `tokens` x `channels`."""
        return min(self._block, tokens, channels)

    @property
    def rounds(self) -> int:
        """Iterations, the default resolved."""
        if self.iterations is not None:
            return self.iterations
        return 2 if self._block >= 3 * self.rank_limit(self._block) else 3

    @property
    def _block(self) -> int:
        if self.block is not None:
            return self.block
        return max(MIN_BLOCK, 4 * self.rank) if self.variance is None else VARIANCE_BLOCK

    def rank_limit(self, columns: int) -> int:
        """The most directions a picture can be given, for a block of `columns`."""
        return self.rank if self.variance is None else max(1, columns // 2)

    def check(self, *, tokens: int, channels: int, keep: int) -> None:
        """Refuse, in a sentence, what cannot be done with T = `tokens`, D = `channels` and K = `keep`."""
        if not 1 <= keep <= tokens:
            raise UserError(f"cannot keep {keep} of {tokens} tokens: keep from 1 to {tokens}")
        if self.name == "none" and keep != tokens:
            raise UserError(f"the selector `none` keeps all {tokens} tokens: choose another to keep {keep}")
        if self.by_leverage and self.variance is None and self.rank > min(tokens, channels):
            raise UserError(
                f"rank {self.rank} is more than the {min(tokens, channels)} directions that features of "
                f"{tokens} tokens x {channels} channels can have: give a smaller rank"
            )

    def manifest_fields(self, start: str = "seeded") -> dict[str, object]:
        """For the manifest: the settings that this selector uses, defaults resolved; `start`: "seeded" or "calibrated".

        `SelectorConfig` of the same fields (less `start` and those left out) builds the same graph.
        """
        if self.name == "random":
            return {"name": self.name, "seed": self.seed}
        if not self.by_leverage:
            return {"name": self.name}
        return {
            "name": self.name,
            "rank": self.rank if self.variance is None else None,
            "variance": self.variance,
            "block": self._block,
            "iterations": self.rounds,
            "centre": self.centre,
            "start": start,
            "seed": self.seed if start == "seeded" else None,
        }


def parse_keep(keep: str | int, tokens: int) -> int:
    """K from a count (32, "32") or a share of the T = `tokens` ("10%", rounded to the nearest, at least 1).

    Raises:
        UserError: not a number, below 1, more than there are, or a share outside 0 to 100 %.
    """
    text = str(keep).strip()
    share = text.endswith("%")
    try:
        number = float(text[:-1]) if share else int(text)
    except ValueError:
        raise UserError(f"cannot keep {keep!r} tokens: give a count such as 32 or a share such as 10%") from None
    if share:
        if not 0.0 < number <= 100.0:
            raise UserError(f"cannot keep {text} of the tokens: a share is above 0% and up to 100%")
        return max(1, round(tokens * number / 100))
    if number < 1:
        raise UserError(f"cannot keep {text} tokens: keep 1 or more")
    if number > tokens:
        raise UserError(f"cannot keep {text} tokens: the picture has {tokens}")
    return int(number)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
