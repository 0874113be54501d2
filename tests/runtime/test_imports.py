"""The runtime stays light: no torch, nothing heavy until it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svdprune.runtime.errors import MissingDependency
from svdprune.runtime.lazy import require

HEAVY = ["numpy", "onnxruntime", "PIL", "tokenizers", "jinja2"]
NEVER = ["torch", "transformers", "onnx", "svdprune.exporter", "svdprune.calib"]


def loaded(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after ``code``."""
    listing = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not loaded("import svdprune.runtime") & {*HEAVY, *NEVER}


def test_naming_what_it_offers_imports_no_backend() -> None:
    modules = loaded("from svdprune.runtime import *")
    assert not modules & {*NEVER, "onnxruntime", "PIL", "tokenizers", "jinja2"}


def test_answering_needs_neither_torch_nor_transformers(bundle: Path) -> None:
    code = (
        f"from svdprune.runtime import load\nvlm = load({str(bundle)!r}, threads=1)\n"
        f"vlm.chat({str(bundle / 'golden' / 'image.png')!r}).ask('What?', max_new_tokens=2)"
    )
    assert not loaded(code) & set(NEVER)


def test_names_that_are_not_there() -> None:
    import svdprune.runtime

    assert "load" in dir(svdprune.runtime)
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = svdprune.runtime.unload


def test_require() -> None:
    assert require("json").__name__ == "json"
    with pytest.raises(
        MissingDependency, match=r"export needs the package `not_there`, .*: pip install 'svdprune\[export\]'"
    ):
        require("not_there.part", "export", "export")


def test_require_does_not_hide_a_fault_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import another_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="another_that_is_missing"):
        require("broken_package")
