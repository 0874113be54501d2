"""A bundle as one HTML page: gathered from its files and rendered. The page loads nothing and runs no script."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup, escape

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.cli.show import human_bytes
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.manifest import Manifest
from svdprune.runtime.profile.report import FIRST_TOKEN, ProfileReport
from svdprune.runtime.report import PAGE
from svdprune.runtime.report.costs import estimate_section, headline_seconds, memory_section, times_section
from svdprune.runtime.report.facts import Facts
from svdprune.runtime.report.findings import read_agreement, read_calibrated
from svdprune.runtime.report.parts import Section, milliseconds, percent
from svdprune.runtime.report.pictures import Packed, Shown, golden_picture, stored_pictures
from svdprune.runtime.report.quality import agreement_section, energy_section, kept_section, quantisation_section
from svdprune.runtime.report.settings import engines_section, files_section, settings_section

TEMPLATE, STYLE = "page.html.jinja", "page.css"
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what HTML may not hold


def render_page(
    bundle: Bundle, facts: Facts, pictures: Sequence[Shown] = (), profile: ProfileReport | None = None
) -> str:
    """The page.

    Args:
        bundle: an opened bundle; at export one whose manifest lists the files without their hashes.
        facts: what the export found out.
        pictures: more than the golden one and those that the export drew.
        profile: of this bundle, in place of the export's short measurement.

    Raises:
        BundleError: a file that the page shows is not as it was written.
        UserError: a profile of another bundle.
    """
    manifest = bundle.manifest
    if profile is not None:
        check_profile(profile, manifest)
    measured = profile or facts.measured
    calibrated, size = read_calibrated(bundle), sum(info.size for info in manifest.files.values())
    shown = [golden_picture(bundle), *stored_pictures(bundle, facts), *pictures]
    sections = [
        kept_section(manifest, shown, facts.pictures_note),
        energy_section(manifest.vision, facts.energy, calibrated),
        agreement_section(manifest, read_agreement(bundle)),
        times_section(measured, facts.measured_note, brief=profile is None),
        estimate_section(facts.estimate, facts.estimate_note, facts.elsewhere),
        memory_section(manifest, facts.estimate, size),
        quantisation_section(manifest.vision),
        engines_section(bundle),
        settings_section(manifest, facts.licence),
        files_section(bundle, PAGE),
    ]
    return _render(manifest, _headline(manifest, facts, measured, size), sections)


def check_profile(profile: ProfileReport, manifest: Manifest) -> None:
    """Refuse the profile of another bundle.

    Raises:
        UserError: naming what differs.
    """
    vision = manifest.vision
    for name, theirs, ours in (
        ("model", profile.model, manifest.model.id),
        ("vision tokens", profile.tokens, vision.tokens),
        ("kept tokens", profile.pruned.tokens, vision.keep),
        ("target", profile.target, manifest.target),
        ("vision precision", profile.vision_precision, vision.precision),
    ):
        if theirs != ours:
            raise UserError(f"the profile is of another bundle ({name} {theirs}, here {ours}): profile this one")


def _headline(
    manifest: Manifest, facts: Facts, measured: ProfileReport | None, size: int
) -> list[tuple[str, str, str]]:
    """The tiles at the head: (what, figure, more)."""
    vision = manifest.vision
    tiles = [("vision tokens", f"{vision.keep} of {vision.tokens}", f"{percent(vision.keep / vision.tokens)} kept")]
    if measured is not None:
        first = measured.pruned.stages.get(FIRST_TOKEN)
        whole = measured.unpruned.stages.get(FIRST_TOKEN) if measured.unpruned else None
        if first is not None:
            against = f", {milliseconds(whole.median)} with all tokens" if whole else ""
            where = f"measured, {measured.where.kind} of the machine below{against}"
            tiles.append(("first token", milliseconds(first.median), where))
    estimate = facts.estimate
    if estimate is not None and estimate.pruned.first_token is not None:
        pair = headline_seconds(estimate.pruned), headline_seconds(estimate.unpruned)
        words = f"{estimate.kind}; {pair[1]} with all tokens"
        tiles.append((f"first token on {estimate.target}", pair[0], words))
    precisions = f"vision {vision.precision}, decoder {manifest.decoder.precision}"
    tiles.append(("size on disk", human_bytes(size), precisions))
    return tiles


def _render(manifest: Manifest, tiles: Sequence[tuple[str, str, str]], sections: Sequence[Section]) -> str:
    jinja2 = require("jinja2", feature="the report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_resource),
    )
    environment.filters |= {"code": _code, "data": _data_url}
    page: str = environment.get_template(TEMPLATE).render(
        style=Markup(_resource(STYLE)),
        manifest=manifest,
        tiles=tiles,
        sections=sections,
        version=importlib.metadata.version("svdprune"),
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return _CONTROL.sub("\ufffd", page)


def _resource(name: str) -> str:
    return resources.files("svdprune.runtime.report").joinpath(name).read_text(encoding="utf-8")


def _code(text: str) -> Markup:
    """Escaped text; what stands between a pair of backticks becomes code."""
    pieces: list[Any] = str(text).split("`")
    if len(pieces) % 2 == 0:  # a lone backtick is a backtick
        pieces[-2:] = ["`".join(pieces[-2:])]
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if number % 2 else escape(piece) for number, piece in enumerate(pieces)
    )


def _data_url(picture: Packed) -> Markup:
    return Markup("data:{};base64,{}").format(picture.media, base64.b64encode(picture.data).decode("ascii"))
