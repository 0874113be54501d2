"""How one answer is to be generated: the caller's settings over the bundle's defaults, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import GenerationDefaults
from svdprune.runtime.sampling import Sampling
from svdprune.runtime.stops import check_stops


@dataclass(frozen=True)
class Options:
    """Checked settings of one answer. ``max_new_tokens`` is 1 or more; ``stop`` holds the strings that end it."""

    max_new_tokens: int
    sampling: Sampling
    stop: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        defaults: GenerationDefaults,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Options:
        """The settings, None standing for the bundle's default.

        Raises:
            UserError: a value out of its range.
        """
        longest = defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if longest < 1:
            raise UserError(f"max_new_tokens is {longest}, it must be 1 or more")
        sampling = Sampling(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            seed=seed,
        )
        return Options(longest, sampling, check_stops(stop))
