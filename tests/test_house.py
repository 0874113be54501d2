"""Rules of the house, held by tests: what the runtime may import, and what a tracked file may say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Put before the code of a child process: importing any of the named top-level modules fails as if it were absent.
BLOCKER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
# commands that need the exporter or calib, inside their function
DOORS = (
    "runtime/cli/export.py",
    "runtime/cli/export_summary.py",
    "runtime/cli/estimate.py",
    "runtime/cli/evaluate.py",
    "runtime/cli/calibrate.py",
)
EXPORT_ONLY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")


def run_without(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a child process in which the modules ``blocked`` cannot be imported."""
    script = BLOCKER.format(blocked=tuple(blocked)) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def runtime_modules() -> list[str]:
    """Every module of the runtime by its import name."""
    places = sorted((ROOT / "runtime").rglob("*.py"))
    parts = (("svdprune", *place.relative_to(ROOT).with_suffix("").parts) for place in places)
    return [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]


def test_the_runtime_imports_without_the_exporters_packages():
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in runtime_modules())
    done = run_without(EXPORT_ONLY, code)
    assert done.returncode == 0, done.stderr


def test_importing_the_runtime_is_light():
    code = (
        "import svdprune.runtime\n"
        "heavy = {'onnxruntime', 'PIL', 'tokenizers', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_without((), code)
    assert done.returncode == 0, done.stderr


def test_the_arrows_point_one_way():
    """exporter -> calib -> runtime; torch and transformers in the runtime only inside the reference decoder."""
    allowed = {"runtime": ("runtime",), "calib": ("runtime", "calib")}
    for folder, may in allowed.items():
        for place in (ROOT / folder).rglob("*.py"):
            for package in re.findall(r"^\s*(?:from|import) svdprune\.(\w+)", place.read_text(encoding="utf-8"), re.M):
                seam = place.relative_to(ROOT).as_posix() in DOORS
                assert package in may or seam, f"{place.relative_to(ROOT)} imports svdprune.{package}"
    for place in (ROOT / "runtime").rglob("*.py"):
        named = re.search(r"^\s*(?:import|from) (?:torch|transformers)\b", place.read_text(encoding="utf-8"), re.M)
        assert not named or place.name == "transformers.py", f"{place.relative_to(ROOT)} imports torch or transformers"


def tracked_text() -> list[tuple[str, str]]:
    """(name, content) of every tracked text file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        place = ROOT / name
        if place.is_file() and b"\0" not in (content := place.read_bytes())[:8192]:
            found.append((name, content.decode("utf-8")))
    assert found
    return found


def test_no_tracked_file_names_a_place_of_one_machine():
    pattern = re.compile(r"(?<![\w.$}~-])/(?:work|home|root|Users)/\w|index-url\s*=?\s*https?:|download\.pytorch\.org")
    hits = [
        f"{name}: {line.strip()[:100]}"
        for name, text in tracked_text()
        if name != "tests/test_house.py"
        for line in text.splitlines()
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_nothing_is_left_unfinished():
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b")
    hits = [
        f"{name}: {line.strip()[:100]}"
        for name, text in tracked_text()
        if name.split("/")[0] in ("runtime", "calib", "exporter", "tools")
        for line in text.splitlines()
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)
