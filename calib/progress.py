"""How long steps tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]
"""Called with what is under way and, where known, the share that is done (0 to 1)."""
