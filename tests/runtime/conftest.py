"""What the runtime's tests share. They run without torch and transformers; the few that compare skip there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from svdprune.runtime import Vlm, load


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle. Do not change it: copy it first."""
    return tiny.make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, its decoder run with a shared cache."""
    return tiny.make_bundle(tmp_path_factory.mktemp("bundles") / "shared", decoder={"kv_cache": "shared"})


@pytest.fixture
def open_tiny(bundle: Path) -> Callable[..., Vlm]:
    """``load`` on the tiny bundle with one thread."""
    return lambda **options: load(bundle, threads=1, **options)
