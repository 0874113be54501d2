"""The command line: ``svdprune`` and ``svdprune-export``. One file a command; the work is in the library."""

from __future__ import annotations

from svdprune.runtime.cli.app import main, main_export

__all__ = ["main", "main_export"]
