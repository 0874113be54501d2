"""Read a bundle and answer: no torch, no transformers.

>>> from svdprune.runtime import load
>>> vlm = load("bundle/")
>>> for piece in vlm.ask("cat.jpg", "What is this?", stream=True):
...     print(piece, end="", flush=True)

Names are imported when first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdprune.runtime.answer import Answer, AnswerStream, Sight, Times, Tokens
    from svdprune.runtime.bundle import Bundle, open_bundle, write_bundle
    from svdprune.runtime.chat import Chat
    from svdprune.runtime.errors import BundleError, MissingDependency, NumericalError, SvdpruneError, UserError
    from svdprune.runtime.manifest import Manifest
    from svdprune.runtime.vlm import Vlm, load

_HOMES = {
    "answer": ("Answer", "AnswerStream", "Sight", "Times", "Tokens"),
    "bundle": ("Bundle", "open_bundle", "write_bundle"),
    "chat": ("Chat",),
    "errors": ("BundleError", "MissingDependency", "NumericalError", "SvdpruneError", "UserError"),
    "manifest": ("Manifest",),
    "vlm": ("Vlm", "load"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "AnswerStream",
    "Bundle",
    "BundleError",
    "Chat",
    "Manifest",
    "MissingDependency",
    "NumericalError",
    "Sight",
    "SvdpruneError",
    "Times",
    "Tokens",
    "UserError",
    "Vlm",
    "load",
    "open_bundle",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
