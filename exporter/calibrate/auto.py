"""`--keep auto` inside an export: the questions, the search, and what it saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from svdprune.calib.keep_curve import KeepCurve
from svdprune.calib.progress import Progress
from svdprune.calib.sources import DEFAULT_QUESTIONS, open_source
from svdprune.exporter.calibrate.graph import confirm
from svdprune.exporter.calibrate.keep import (
    AGREEMENT,
    AUTO,
    LEAST,
    LIMIT,
    PICTURES,
    SOURCE,
    Examination,
    Held,
    check_agreement,
    find_keep,
)
from svdprune.exporter.calibrate.saving import saving_of
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.quantise import Quantised
from svdprune.exporter.vision_file import GRAPH, VisionFile
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Positions


@dataclasses.dataclass(frozen=True)
class Wish:
    """How K is to be found; None for an option takes its default.

    `images`: a source's spec. `pictures`: the most of them. `questions`: asked about pictures that have none. `limit`:
    the most tokens of an answer.
    """

    agreement: float | None = None
    images: str | None = None
    pictures: int | None = None
    questions: tuple[str, ...] = ()
    limit: int | None = None


def wants_search(keep: str, select: str, wish: Wish) -> bool:
    """Whether K is to be searched.

    Raises:
        UserError: options of the search without it, or a search where nothing is dropped.
    """
    if str(keep).strip().lower() != AUTO:
        given = {
            "--agreement": wish.agreement,
            "--images": wish.images,
            "--pictures": wish.pictures,
            "--question": wish.questions or None,
            "--max-new-tokens": wish.limit,
        }
        if unused := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(unused)} belongs to --keep auto, not to --keep {keep}: leave it out")
        return False
    if select == "none":
        raise UserError("--select none keeps all tokens: there is no --keep auto to search")
    if wish.agreement is not None:
        check_agreement(wish.agreement)
    return True


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search for K found.

    Attributes:
        curve: with its answer, and what that saves on the target. graph: the vision graph of that K; quantised: what
            `VisionFile.write` gave with it. held: the questions, to ask a bundle the same.
    """

    curve: KeepCurve
    graph: Path
    quantised: Quantised | None
    held: Held


def search_keep(
    maker: VisionFile,
    where: str,
    positions: Positions,
    wish: Wish,
    seed: int,
    folder: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> Search:
    """Search K by the selector in torch, then see to it that the exported graph agrees as well.

    Pictures come from `wish.images`, otherwise from where the calibration had its own, otherwise they are drawn; those
    that made the calibration's start are not asked about. The vision graph is left in `folder`.

    Raises:
        UserError: no usable questions, too few pictures, or no K that agrees.
    """
    checkpoint, chosen = maker.checkpoint, maker.chosen
    if maker.spec.budget == "prompt":
        raise UserError("--keep auto asks about one picture at a time: with --budget prompt give a count")
    held = chosen.calibration.pictures if chosen.calibration else None
    spec = wish.images
    if spec is None and held is not None:
        spec, seed = held.source, held.seed  # the same order again
    if spec is None:
        spec = SOURCE
        say("note: K is chosen by drawn scenes: --images FOLDER lets your own pictures decide")
    excluded: Sequence[str] = held.start_digests if held else ()
    pictures = wish.pictures or PICTURES
    source = open_source(
        spec,
        limit=pictures + len(excluded),
        seed=seed,
        at_least=LEAST,
        questions=wish.questions or DEFAULT_QUESTIONS,
    )
    progress(f"loading {where}", 0.0)
    model = Model(checkpoint, where, report=lambda note: progress(note, None), spec=maker.spec)
    limit = wish.limit or LIMIT
    examination = Examination(model, chosen.config, chosen.start, positions, source.protocol, limit)
    curve = find_keep(examination, source, wish.agreement or AGREEMENT, excluded, pictures, progress, say)
    if source.broken:
        say(f"note: {source.describe_broken()}")
    curve, quantised = confirm(curve, examination, maker, folder, progress, say)
    try:
        curve = dataclasses.replace(curve, saving=saving_of(curve, checkpoint, maker.target))
    except UserError as error:
        say(f"note: what K = {curve.keep} saves is not counted: {error}")
    return Search(curve, folder / GRAPH, quantised, examination.held())
