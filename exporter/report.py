"""The page of a bundle that is being exported: what only the export can find out, and the page itself.

Nothing here may spoil an export: what cannot be measured or counted becomes a note on the page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from svdprune.calib.calibration import Calibration
from svdprune.calib.sources import Sample, open_source
from svdprune.calib.spectrum import Spectrum
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.golden import golden_case
from svdprune.exporter.licence import weights_licence
from svdprune.exporter.report_estimate import counted
from svdprune.exporter.unfinished import unfinished
from svdprune.runtime.answer import Sight
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import open_decoder
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.machine import host_memory
from svdprune.runtime.manifest import Manifest
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.profile.report import ProfileReport
from svdprune.runtime.report import FACTS, PAGE
from svdprune.runtime.report.facts import Energy, Facts
from svdprune.runtime.report.measure import quick_profile
from svdprune.runtime.report.page import render_page
from svdprune.runtime.report.pictures import Shown, image_settings, look, shown, store_pictures
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.tiling.slots import lay_out
from svdprune.runtime.vision import VisionBackend, open_vision
from svdprune.runtime.vlm import Vlm

Say = Callable[[str], None]
HUB = "hf:"  # not looked at for a page alone, as that may fetch
SAMPLES = 3  # pictures of the user's beside the golden one
QUICK_BYTES = 4e9  # of graphs and weights, up to which an export measures and answers
ROOM = 3  # times their size that must be free
DIGITS = 6  # of an energy curve


@dataclass(frozen=True)
class Samples:
    """A few of the pictures that the export was given; `note` says why there are none though some were given."""

    source: str = ""
    samples: Sequence[Sample] = ()
    note: str | None = None


def take_samples(given: Sequence[str | None], calibration: Calibration | None, seed: int) -> Samples:
    """Pictures of the first source that was given, or of the calibration's where it is still there.

    Args:
        given: specs of sources that the export reads anyway. seed: of the choice among the pictures.
    """
    specs = [spec for spec in given if spec is not None]
    if calibration is not None and not calibration.pictures.source.startswith(HUB):
        specs.append(calibration.pictures.source)
    if not specs:
        return Samples()
    try:
        return Samples(specs[0], list(open_source(specs[0], limit=SAMPLES, seed=seed).samples()))
    except SvdpruneError as error:
        return Samples(specs[0], note=f"The pictures of {specs[0]} are not shown: {error}.")


@dataclass(frozen=True)
class Prepared:
    """What the page takes from the reference model, before that is let go."""

    energy: list[Energy]
    samples: Samples


def prepare_report(
    model: nn.Module,
    family: Family,
    spec: VisionSpec,
    images: ImageSettings,
    given: Sequence[str | None],
    calibration: Calibration | None,
    seed: int,
) -> Prepared:
    """Look at the golden picture and at a few of the user's by the reference `model`.

    Args:
        given: specs of sources that the export reads anyway, None for one that it does not. calibration: of the
            export. seed: of the choice among the pictures.
    """
    samples = take_samples(given, calibration, seed)
    return Prepared(energy_curves(model, family, spec, images, golden_case()[0], samples), samples)


@torch.no_grad()
def energy_curves(
    model: nn.Module,
    family: Family,
    spec: VisionSpec,
    images: ImageSettings,
    golden: Image.Image,
    samples: Samples,
) -> list[Energy]:
    """Raw and centred, the mean over the golden picture and the samples."""
    spectra = [Spectrum(centre) for centre in (False, True)]
    pictures = [golden, *(sample.image for sample in samples.samples)]
    for picture in pictures:
        features = _scored(model, family, spec, images, picture)
        if np.isfinite(features).all():  # the golden one's are; a sample with odd features has no curve
            for spectrum in spectra:
                spectrum.add(features)
    source = "the golden one" + (f" and some of {samples.source}" if samples.samples else "")
    return [Energy(s.centre, [round(float(v), DIGITS) for v in s.curve], s.pictures, source) for s in spectra]


def _scored(
    model: nn.Module, family: Family, spec: VisionSpec, images: ImageSettings, picture: Image.Image
) -> np.ndarray:
    """The matrix (T, D) that the selector decomposes; of a picture in tiles with a budget for each, the first one's."""
    dtype = next(model.parameters()).dtype
    tiles = spec.tiles()
    if tiles is None or images.tiling is None:
        pixels = normalise(preprocess(picture, images), images)[None]
        tokens, _ = family.reference_tokens(model, torch.from_numpy(pixels).to(dtype))
        return np.asarray(tokens[0].float().numpy())
    cut = tiling_of(images.tiling).cut(picture, images.resample)
    slots = lay_out(cut, tiles, spec.tokens)
    extras = [torch.from_numpy(cut.extras[name]) for name in spec.extras]
    tokens, _ = family.reference_tokens(model, torch.from_numpy(normalise(cut.pixels, images)).to(dtype), *extras)
    weights = slots.weights[0]
    rows = (tokens.flatten(0, 1).float().numpy()[slots.sources[0]] * weights[..., None]).sum(1)
    return np.asarray(rows[weights.sum(1) > 0])


def write_report(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    prepared: Prepared,
    progress: Say = lambda stage: None,
) -> str:
    """Put the page and its facts into the folder of a bundle whose other files are all there; returns the page's name.

    Raises:
        BundleError: a file of the bundle is not what it should be.
    """
    bundle = unfinished(folder, manifest)
    licence = weights_licence(checkpoint.folder)
    guess = counted(checkpoint, manifest)
    progress("trying the bundle on this machine")
    trial = _try(bundle, prepared.samples)
    notes = [note for note in (prepared.samples.note, trial.pictures_note) if note]
    facts = Facts(
        energy=prepared.energy,
        estimate=guess.estimate,
        estimate_note=guess.note,
        elsewhere=guess.elsewhere,
        measured=trial.measured,
        measured_note=trial.note,
        pictures=store_pictures(folder, trial.pictures),
        pictures_note=" ".join(notes) or None,
        licence=licence,
    )
    place = folder / FACTS
    place.parent.mkdir(exist_ok=True)
    place.write_text(facts.to_json(), encoding="utf-8")
    progress("writing the report")
    page = render_page(unfinished(folder, manifest), facts)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return PAGE


@dataclass
class _Trial:
    """What running the bundle here gave."""

    measured: ProfileReport | None = None
    note: str | None = None
    pictures: Sequence[Shown] = ()
    pictures_note: str | None = None


def _try(bundle: Bundle, samples: Samples) -> _Trial:
    """Measure and look, as far as this machine can in seconds."""
    trial = _Trial()
    manifest = bundle.manifest
    parts = (manifest.vision.file, manifest.decoder.file, manifest.decoder.embedding)
    size = sum(info.size for name, info in manifest.files.items() if name.startswith(parts))
    memory = host_memory()
    if size > QUICK_BYTES or (memory is not None and ROOM * size > memory.available):
        trial.note = f"the graphs and weights take {size / 1e9:.1f} GB, which an export does not load to measure"
    with ExitStack() as stack:
        try:
            vision = open_vision("onnxruntime", bundle, verify=False)
            stack.callback(vision.close)
            vlm = None
            if trial.note is None:
                decoder = open_decoder("onnxruntime", bundle, verify=False)
                stack.callback(decoder.close)
                vlm = Vlm(bundle, vision, decoder, manifest.positions)
            trial.pictures = _look(bundle, vision, vlm, samples)
            if vlm is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdprune-report-")))
                trial.measured = quick_profile(vlm, folder)
        except SvdpruneError as error:  # such as a precision for which ONNX Runtime has no kernel here
            trial.note = trial.note or str(error)
            if samples.samples and not trial.pictures:
                trial.pictures_note = f"The pictures of {samples.source} are not shown: {error}."
    return trial


def _look(bundle: Bundle, vision: VisionBackend, vlm: Vlm | None, samples: Samples) -> list[Shown]:
    """The samples through the bundle's own graph; asked about where the decoder is loaded."""
    found: list[Shown] = []
    info, settings = bundle.manifest.vision, image_settings(bundle)
    if vlm is None and info.tiles is not None:
        return found  # rows between the tokens need the decoder's embeddings
    for sample in samples.samples:
        name, question = Path(sample.name).name, sample.questions[0].text if sample.questions else None
        if vlm is None:
            found.append(shown(name, look(vision, bundle, settings, sample.image), info))
            continue
        sight: Sight = vlm.see(sample.image)
        answer = None if question is None else vlm.ask(sight, question, max_new_tokens=32).text
        found.append(shown(name, sight, info, question, answer))
    return found
