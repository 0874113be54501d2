"""The errors of svdprune: each is one sentence that says what is wrong and what to do next.

A command line prints the sentence and leaves with ``exit_code``: 2 for the caller's mistake, 1 for anything else.
"""

from __future__ import annotations


class SvdpruneError(Exception):
    """Base of every error meant for the user. ``str(error)`` is one sentence; ``exit_code`` is the process's."""

    exit_code = 1


class UserError(SvdpruneError):
    """The caller's mistake: an argument, a file or a picture that cannot be used as it is."""

    exit_code = 2


class BundleError(UserError):
    """A bundle that is incomplete, changed since it was written, newer than this svdprune, or not a bundle."""


class MissingDependency(UserError):
    """A package that the chosen feature needs is not installed.

    Args:
        feature: what needs it, as the start of a sentence ("the transformers decoder").
        package: the import name that was not found.
        extra: the extra of svdprune that installs it ("" when it belongs to no extra).
    """

    def __init__(self, package: str, extra: str = "", feature: str = "this") -> None:
        self.package = package
        self.extra = extra
        name = f"'svdprune[{extra}]'" if extra else package
        super().__init__(f"{feature} needs the package `{package}`, which is not installed: pip install {name}")


class NumericalError(SvdpruneError):
    """A NaN or an infinity where a number is needed: the answer would be arbitrary, so none is given."""
