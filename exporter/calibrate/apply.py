"""The selector of an export: what was asked for, and what a calibration decides where nothing was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from svdprune.calib.calibration import ARRAYS, FILE, Calibration
from svdprune.calib.calibration_files import read_calibration
from svdprune.calib.keep_curve import KeepCurve
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import VisionSpec
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.selection.registry import selector_entry
from svdprune.runtime.bundle import Bundle, BundleWriter
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import CalibrationInfo

FOLDER = "calibration"  # of a bundle


@dataclass(frozen=True)
class Chosen:
    """A selector, and the calibration behind it.

    Attributes:
        start: float32 (D, b), exactly the columns that the graph uses; None for the seeded start.
        calibration: None without one. notes: what of it was taken over and what was not, a sentence each.
    """

    config: SelectorConfig
    start: np.ndarray | None = None
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)

    def manifest_fields(self) -> dict[str, object]:
        """Of the manifest's selector."""
        return self.config.manifest_fields("seeded" if self.start is None else "calibrated")


def choose_selector(
    name: str, given: Mapping[str, Any], seed: int, folder: Path | None, checkpoint: Checkpoint, spec: VisionSpec
) -> Chosen:
    """The selector called `name`.

    Args:
        given: rank, variance, block, iterations and centre as they were asked for; None where they were not.
        seed: of the start without a calibration, and of `random`.
        folder: of a calibration, or None.

    Raises:
        UserError: settings that cannot be, a calibration that cannot be read, or one of another model or tap.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    if folder is None:
        return Chosen(SelectorConfig(name=name, seed=seed, **asked))
    if not selector_entry(name).by_leverage:
        raise UserError(
            f"a calibration is of leverage scores, which the selector {name} does not have: leave out --calibration"
        )
    found, arrays = read_calibration(folder)
    _check_model(found, folder, checkpoint, spec)
    settings = found.settings
    notes = [
        f"--{_option(key, value)} instead of the calibration's {_held(settings, key)}"
        for key, value in asked.items()
        if key == "variance" or value != getattr(settings, key)
    ]
    taken: dict[str, Any] = {"centre": settings.centre}
    if "variance" not in asked:
        taken["rank"] = settings.rank
    centre, rank = asked.get("centre", settings.centre), asked.get("rank", settings.rank)
    if "variance" not in asked and (centre, rank) == (settings.centre, settings.rank):
        taken |= {"block": settings.block, "iterations": settings.iterations}
    elif notes and not {"block", "iterations"} <= asked.keys():
        notes.append("block and iterations are the defaults: the calibrated ones were found for other scores")
    config = SelectorConfig(name=name, seed=seed, **(taken | asked))
    start = arrays["start_centred" if config.centre else "start"]
    columns = config.columns(spec.tokens, spec.channels)
    if columns > start.shape[1]:
        raise UserError(
            f"{folder} holds a start of {start.shape[1]} columns and a block of {columns} was asked for: "
            f"give --block {start.shape[1]} or fewer, or calibrate again with a larger rank"
        )
    return Chosen(config, np.ascontiguousarray(start[:, :columns], np.float32), found, notes)


def calibration_files(
    bundle: BundleWriter, folder: Path | None, chosen: Chosen, curve: KeepCurve | None
) -> CalibrationInfo | None:
    """Put what decided about the selector and about K into the bundle; None where nothing did."""
    info = CalibrationInfo()
    if folder is not None and chosen.start is not None:
        info = CalibrationInfo(f"{FOLDER}/{FILE}", f"{FOLDER}/{ARRAYS}", f"{FOLDER}/start.npy")
        for name in (FILE, ARRAYS):
            shutil.copyfile((folder.parent if folder.is_file() else folder) / name, bundle.file(f"{FOLDER}/{name}"))
        np.save(bundle.file(f"{FOLDER}/start.npy"), chosen.start)
    if curve is not None:
        info = replace(info, keep=f"{FOLDER}/keep.json")
        bundle.file(f"{FOLDER}/keep.json").write_text(curve.to_json(), encoding="utf-8")
    return info if info != CalibrationInfo() else None


def bundle_start(bundle: Bundle) -> np.ndarray | None:
    """The calibrated start inside a bundle, float32 (D, b); None where its selector has the seeded one.

    Raises:
        BundleError: the manifest says that there is one and the file is not.
    """
    manifest = bundle.manifest
    if manifest.vision.selector.start != "calibrated":
        return None
    again = "export the bundle again"
    if manifest.calibration is None or manifest.calibration.start is None:
        raise BundleError(f"{bundle.path}: the manifest names no file of the calibrated start: {again}")
    place = bundle.file(manifest.calibration.start)
    try:
        start = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{place} cannot be read ({error}): {again}") from error
    if not isinstance(start, np.ndarray) or start.ndim != 2 or start.shape[0] != manifest.vision.channels:
        raise BundleError(f"{place} is not an array of {manifest.vision.channels} rows: {again}")
    return start


def _check_model(found: Calibration, folder: Path, checkpoint: Checkpoint, spec: VisionSpec) -> None:
    """Refuse a calibration whose features are not those of this checkpoint."""
    features = found.features
    for name, theirs, ours in (
        ("tap", features.tap, spec.tap),
        ("grid", tuple(features.grid), spec.grid),
        ("channels", features.channels, spec.channels),
        ("budget", features.budget, "tile" if spec.budget == "tile" else "picture"),
    ):
        if theirs != ours:
            raise UserError(
                f"{folder} is a calibration for {name} {theirs} and this model has {ours}: calibrate this model"
            )
    if found.model.sha256 != checkpoint.fingerprint():
        raise UserError(
            f"{folder} is a calibration of {found.model.id} with other weights or another config "
            f"(SHA-256 {str(found.model.sha256)[:12]}, this one {checkpoint.fingerprint()[:12]}): calibrate this model"
        )


def _option(key: str, value: Any) -> str:
    if key == "centre":
        return "centre" if value else "no-centre"
    return f"{key} {value:g}"


def _held(settings: Any, key: str) -> str:
    if key == "centre":
        return "centred features" if settings.centre else "raw features"
    return f"rank {settings.rank}" if key == "variance" else f"{getattr(settings, key)}"
