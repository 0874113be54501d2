"""``report.html``: a bundle on one self-contained page, and what the page is made of."""

from __future__ import annotations

PAGE = "report.html"
REPORT = "report"
FACTS = f"{REPORT}/facts.json"
"""Names inside a bundle: the page, and the folder and file of what the export found out for it."""
