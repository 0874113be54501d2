"""A real browser without a window: pictures of a page, and what it complains about."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
LIMIT = 180  # seconds; a busy machine starts a browser slowly
ABSENT = f"no browser on this machine (looked for {', '.join(NAMES)})"


def find_browser() -> str | None:
    """The first of ``NAMES`` on the path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(browser: str, page: Path, width: int, height: int, dark: bool = False) -> tuple[Image.Image, list[str]]:
    """(a screenshot of width x height, what the browser's console said)."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        said = _run(browser, folder, page, width, height, f"--screenshot={shot}", *_scheme(dark)).stderr
        with Image.open(shot) as picture:
            picture.load()
            return picture.convert("RGB"), re.findall(r".*:CONSOLE.*", said)


def layout(browser: str, page: Path, width: int) -> tuple[int, int]:
    """(width of the window, width that the page takes in it), told by a script put into a copy of the page."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r"<meta http-equiv[^>]*>", "", html)
    script = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script></body>"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.html"
        copy.write_text(html.replace("</body>", script), encoding="utf-8")
        dumped = _run(browser, folder, copy, width, 800, "--dump-dom").stdout
    found = re.search(r"<title>(\d+) (\d+)</title>", dumped)
    assert found, dumped[:500]
    return int(found[1]), int(found[2])


def _run(
    browser: str, folder: str, page: Path, width: int, height: int, *options: str
) -> subprocess.CompletedProcess[str]:
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()  # it refuses root otherwise
    fixed = ("--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--enable-logging=stderr", "--v=0")
    place = (f"--user-data-dir={folder}/profile", f"--window-size={width},{height}")
    words = [browser, *fixed, *root, *place, *options, page.resolve().as_uri()]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LIMIT, check=False)


def _scheme(dark: bool) -> tuple[str, ...]:
    return (f"--blink-settings=preferredColorScheme={0 if dark else 1}",)
