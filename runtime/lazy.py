"""Imports put off until they are used, so that ``import svdprune.runtime`` and ``--help`` stay quick and light."""

from __future__ import annotations

import importlib
from types import ModuleType

from svdprune.runtime.errors import MissingDependency


def require(module: str, extra: str = "", feature: str | None = None) -> ModuleType:
    """Import ``module``, or say which package to install.

    Args:
        module: dotted name ("onnxruntime", "PIL.Image").
        extra: the svdprune extra that brings it ("export"); "" for a base dependency.
        feature: what needs it, for the message; by default the module's top-level name is all that is said.

    Raises:
        MissingDependency: when the module's own top-level package is absent. An import error from within an installed
            package is a different fault and passes through unchanged.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingDependency(top, extra, feature or "this command") from error
