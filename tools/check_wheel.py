"""Check that a built wheel holds what an installed svdprune needs: every package, the type marker, the shipped model.

python tools/check_wheel.py build/wheel/svdprune-*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "calib", "exporter")
DATA = "exporter/models"
MODEL = ("mini-llava/config.json", "mini-llava/model.safetensors")  # without these the shipped model is not one


def missing(wheel: Path) -> list[str]:
    """Files of the source folders that the wheel lacks, as paths relative to the repository."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    wanted += [ROOT / package / "py.typed" for package in PACKAGES]
    wanted += [path for path in (ROOT / DATA).rglob("*") if path.is_file()]
    wanted += [ROOT / DATA / name for name in MODEL]
    wanted += (ROOT / "runtime/report").glob("page.*")
    names = (path.relative_to(ROOT).as_posix() for path in wanted)
    return sorted({name for name in names if f"svdprune/{name}" not in held})


def main() -> None:
    """Print the verdict and leave with 1 when something is missing."""
    wheel = Path(sys.argv[1])
    lacking = missing(wheel)
    for name in lacking:
        print(f"{wheel.name} lacks {name}", file=sys.stderr)
    if lacking:
        sys.exit("put the file there, and list its package or its kind in pyproject.toml, [tool.setuptools]")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, complete")


if __name__ == "__main__":
    main()
