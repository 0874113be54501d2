"""One pass over the pictures: each is encoded once and has one use."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from svdprune.calib.calibration import PROJECTED, digest
from svdprune.calib.progress import Progress
from svdprune.calib.sources import Labelled, Source
from svdprune.calib.spectrum import Spectrum
from svdprune.calib.start import Pool
from svdprune.exporter.evaluate.model import Eyes
from svdprune.exporter.evaluate.seen import Seen
from svdprune.runtime.errors import NumericalError, UserError

START, CHOICE, JUDGEMENT = "start", "choice", "judgement"
ROLES = (START, CHOICE, START, JUDGEMENT)  # in turn
LEAST = len(ROLES)  # pictures, so that each use has one
LAYER = "vision_feature_layer"


@dataclass
class Looked:
    """A picture that takes part in the choice between settings."""

    name: str
    seen: Seen
    questions: list[Labelled]


@dataclass
class Gathered:
    """What the pass left.

    Attributes:
        pool: for the start, at the checkpoint's own tap. spectra: by (tap, centred).
        choice: pictures that choose. judgement: what is decomposed, (n, D), at the own tap, of `judges` pictures.
        digests: of the pictures that made the start. duplicates: pictures seen before, left out.
    """

    pool: Pool = field(default_factory=Pool)
    spectra: dict[tuple[str, bool], Spectrum] = field(default_factory=dict)
    choice: list[Looked] = field(default_factory=list)
    judgement: list[np.ndarray] = field(default_factory=list)
    judges: int = 0
    digests: list[str] = field(default_factory=list)
    duplicates: int = 0

    @property
    def pictures(self) -> int:
        """All that were used."""
        return len(self.digests) + len(self.choice) + self.judges


def other_taps(eyes: Eyes) -> list[int]:
    """Hidden states beside the checkpoint's own that are looked at: the last and the last but one, where there are."""
    config = eyes.checkpoint.config
    if LAYER not in config:
        return []
    layers = config["vision_config"].get("num_hidden_layers")
    own = eyes.spec.tap
    depth = own if own < 0 or layers is None else own - layers - 1  # counted from the end
    return [tap for tap in (-2, -1) if tap != depth and (layers is None or layers + tap >= 0)]


def gather(eyes: Eyes, source: Source, at_least: int, progress: Progress) -> Gathered:
    """Encode the pictures of a source and hand each to its use.

    Raises:
        UserError: fewer than `at_least` different pictures.
        NumericalError: NaN or infinity in the features, with the picture's name.
    """
    others = other_taps(eyes)
    for tap in others:
        eyes.add_tap(tap)
    taps: dict[str, int | str | None] = {str(eyes.spec.tap): None}
    taps.update((str(tap), tap) for tap in others)
    taps[PROJECTED] = PROJECTED
    found = Gathered(spectra={(name, centre): Spectrum(centre) for name in taps for centre in (False, True)})
    known: set[str] = set()
    for sample in source.samples():
        mark = mark_of(sample.image)
        if mark in known:
            found.duplicates += 1
            continue
        known.add(mark)
        number = len(known)
        progress(f"encoding picture {number} of {source.count}", (number - 1) / source.count)
        role = ROLES[(number - 1) % len(ROLES)]
        try:
            seen = eyes.see(sample.image, projected=role != JUDGEMENT)
        except NumericalError as error:
            raise NumericalError(f"{sample.name}: {error}") from error
        if role == START:
            found.digests.append(mark)
            for matrix in seen.matrices():
                found.pool.add(matrix)
            for (name, _), spectrum in found.spectra.items():
                for matrix in seen.matrices(taps[name]):
                    spectrum.add(matrix)
        elif role == CHOICE:
            found.choice.append(Looked(sample.name, seen, sample.questions))
        else:
            found.judges += 1
            found.judgement += seen.matrices()
    if found.pictures < max(at_least, LEAST):
        raise UserError(
            f"{source.spec} has {found.pictures} different usable pictures and {max(at_least, LEAST)} are needed"
            + (f" ({found.duplicates} are copies of others)" if found.duplicates else "")
            + (f"; {source.describe_broken()}" if source.broken else "")
            + ": give more pictures"
        )
    return found


def mark_of(image: Image.Image) -> str:
    """What tells a decoded picture from every other."""
    return digest(np.asarray(image.convert("RGB"), np.uint8))
