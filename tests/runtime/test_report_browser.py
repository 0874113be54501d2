"""The page in a real browser: it is drawn, it fits a phone, and the console stays silent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from browser import ABSENT, find_browser, layout, look
from golden import golden_bundle
from report_cases import facts_of, profile_of

from svdprune.runtime.bundle import open_bundle
from svdprune.runtime.report.page import render_page

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason=ABSENT)
PHONE, DESK = (390, 844), (1200, 2400)


@pytest.fixture(scope="module")
def page(bundle, tmp_path_factory):
    """A full page, with text that would run if it were markup."""
    right = golden_bundle(bundle, tmp_path_factory.mktemp("golden") / "right")
    facts = dataclasses.replace(facts_of(), licence="<script>console.error('ran')</script>", pictures_note="x" * 400)
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(render_page(open_bundle(right), facts, profile=profile_of(right)), encoding="utf-8")
    return place


def test_the_console_would_be_heard(tmp_path):
    """The check below can fail."""
    place = tmp_path / "noisy.html"
    place.write_text("<!DOCTYPE html><title>t</title><script>console.error('ouch')</script>")
    _, said = look(BROWSER, place, 300, 200)
    assert any("ouch" in line for line in said)


def test_it_is_drawn_and_nothing_complains(page):
    picture, said = look(BROWSER, page, *DESK)
    assert said == []
    assert picture.size == DESK
    pixels = np.asarray(picture)
    assert len(picture.getcolors(1 << 24)) > 200  # the pictures and charts are there, not only text
    drawn = (pixels != pixels[0, 0]).any(axis=2)  # [height, width]
    rows = np.flatnonzero(drawn.any(axis=1))
    assert rows.min() < 100 and rows.max() > DESK[1] * 0.9 and 0.03 < drawn.mean() < 0.9


def test_light_and_dark(page):
    light, dark = (np.asarray(look(BROWSER, page, 600, 400, dark=dark)[0]) for dark in (False, True))
    assert light[0, 0].min() > 230 and dark[0, 0].max() < 40  # the paper
    assert light.min() < 80 and dark.max() > 200  # the ink on it


def test_it_fits_a_phone(page):
    window, taken = layout(BROWSER, page, PHONE[0])
    assert window <= 500 and taken <= window  # wide tables scroll in themselves
