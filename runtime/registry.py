"""Backends by name. A name is registered with where it lives, and imported only when it is chosen."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from svdprune.runtime.errors import UserError


class Registry:
    """Names of one kind of backend ("vision backend") to ``module:function`` that opens it."""

    def __init__(self, kind: str, places: dict[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)

    def names(self) -> list[str]:
        """The choices, in order of registration."""
        return list(self._places)

    def register(self, name: str, place: str) -> None:
        """Add a backend: ``place`` is "package.module:function", imported when the name is first chosen."""
        self._places[name] = place

    def find(self, name: str) -> Any:
        """The function that opens the backend ``name``.

        Raises:
            UserError: unknown name; the choices are listed and a near miss suggested.
        """
        if name not in self._places:
            near = difflib.get_close_matches(name, self._places, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"no {self.kind} is called {name!r}{hint}: choose one of {', '.join(self._places)}")
        module, _, function = self._places[name].partition(":")
        return getattr(importlib.import_module(module), function)
