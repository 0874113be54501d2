"""``svdprune report``: a bundle on one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.options import backend_options
from svdprune.runtime.cli.show import Steps
from svdprune.runtime.errors import BundleError, UserError

if TYPE_CHECKING:
    from svdprune.runtime.bundle import Bundle
    from svdprune.runtime.profile.report import ProfileReport
    from svdprune.runtime.report.pictures import Shown

PICTURES = 6


@click.command("report", cls=Command, short_help="A bundle on one self-contained HTML page.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PATH",
    help="A picture to show, or a folder of them; may be given again.",
)
@click.option("--limit", type=click.IntRange(min=1), default=PICTURES, show_default=True, help="The most of those.")
@click.option("--prompt", metavar="TEXT", help="Ask this about each of them.")
@click.option(
    "--profile",
    "profiled",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `svdprune profile --json` printed.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The page.  [default: ./<bundle>-report.html; the bundle's own may be named, its hash is kept right]",
)
@backend_options
def command(
    bundle: Path,
    images: tuple[Path, ...],
    limit: int,
    prompt: str | None,
    profiled: Path | None,
    out: Path | None,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
) -> None:
    """Write the page of BUNDLE again: with pictures of yours, a profile of this machine, the engines built since.

    Backends run only for --images; the decoder only for --prompt.
    """
    from svdprune.runtime.bundle import open_bundle
    from svdprune.runtime.report.facts import read_facts
    from svdprune.runtime.report.page import check_profile, render_page
    from svdprune.runtime.report.place import check_place, default_place, put_page

    if prompt is not None and not images:
        raise UserError("--prompt is asked about the pictures of --images: give some")
    with Steps() as steps:
        steps("checking the bundle", 0.0)
        opened = open_bundle(bundle)
        place = out or default_place(opened)
        check_place(opened, place)
        report = None if profiled is None else _read_profile(profiled)
        if report is not None:
            check_profile(report, opened.manifest)
        pictures: list[Shown] = []
        if images:
            steps("looking at the pictures", 0.2)
            pictures = _look(opened, images, limit, prompt, vision_backend, decoder_backend, checkpoint, threads)
        steps("writing the page", 0.9)
        put_page(opened, render_page(opened, read_facts(opened), pictures, report), place)
    click.echo(f"report         {place}")


def _look(
    bundle: Bundle,
    images: tuple[Path, ...],
    limit: int,
    prompt: str | None,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
) -> list[Shown]:
    """The pictures, seen by the vision backend; asked about where there is a question."""
    from contextlib import closing

    from svdprune.runtime.report.pictures import image_settings, look, picture_files, shown
    from svdprune.runtime.vision import open_vision
    from svdprune.runtime.vlm import load

    files, info = picture_files(images, limit), bundle.manifest.vision
    found = []
    if prompt is None:
        settings = image_settings(bundle)
        with closing(open_vision(vision_backend, bundle, threads)) as vision:
            for file in files:
                found.append(shown(file.name, look(vision, bundle, settings, file), info))
        return found
    # the hashes were compared a moment ago
    with load(bundle.path, vision_backend, decoder_backend, threads, verify=False, checkpoint=checkpoint) as vlm:
        by = f"by this bundle: vision {vision_backend}, decoder {decoder_backend}"
        for file in files:
            sight = vlm.see(file)
            found.append(shown(file.name, sight, info, prompt, vlm.ask(sight, prompt).text, by))
    return found


def _read_profile(file: Path) -> ProfileReport:
    """What `svdprune profile --json` printed, checked."""
    from svdprune.runtime.profile.report import ProfileReport
    from svdprune.runtime.report.facts import read_finite

    again = "give what `svdprune profile BUNDLE --json` printed"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read or is not JSON ({error}): {again}") from error
    try:
        return read_finite(ProfileReport, content, str(file), again)
    except BundleError as error:
        raise UserError(str(error)) from error
