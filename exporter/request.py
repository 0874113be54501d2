"""What is asked of an export, and what is said of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from svdprune.calib.keep_curve import KeepCurve
from svdprune.exporter.calibrate.apply import Chosen
from svdprune.exporter.calibrate.auto import Wish
from svdprune.exporter.families.base import Budget
from svdprune.runtime.manifest import Positions, QuantisationInfo


@dataclass(frozen=True)
class ExportRequest:
    """What to export. `keep` is a count ("32"), a share ("10%") or "auto"; None for an option takes its default, for
    `select` that of `default_selector`.

    `calibration` is the folder of one, whose settings are taken where none are given here. `auto` searches the fewest
    tokens whose answers agree with the unpruned model's as `search` says.

    `out` None makes a folder `<model>-k<K>-<target>` in the working directory. `decoder_engine` is `auto` (the decoder
    graph for engines is written where the target's TensorRT can build it) or `none`; `cache` is the rows of its KV
    cache, prompt and answer together. `calibration_images` (a source's spec) and `sensitive` (`auto`, `none` or a count
    of blocks left in float) are for the precisions int8 and fp8. `budget` is for models that cut a picture into tiles:
    K of the whole picture, or of each `tile`; `prompt` is K of all pictures of a prompt together, for any model.
    `prompt_pictures` is how many those are at most (and how many the decoder engine's cache has room for).
    `max_pixels` is the largest area of a picture, for models that take any size. `share_decoder_with` is a bundle of
    the same checkpoint whose decoder files become this one's, too. `report` writes `report.html`.
    """

    model: str
    keep: str
    target: str = "cpu"
    out: Path | None = None
    select: str | None = None
    rank: int | None = None
    variance: float | None = None
    block: int | None = None
    iterations: int | None = None
    centre: bool | None = None
    calibration: Path | None = None
    search: Wish = field(default_factory=Wish)
    seed: int = 0
    precision: str = "fp32"
    calibration_images: str | None = None
    sensitive: str | None = None
    decoder_precision: str = "fp32"
    decoder_engine: str = "auto"
    cache: int | None = None
    positions: Positions | None = None
    budget: Budget = "picture"
    prompt_pictures: int | None = None
    max_pixels: int | None = None
    share_decoder_with: Path | None = None
    input: str = "uint8"
    revision: str | None = None
    report: bool = True
    overwrite: bool = False


@dataclass
class ExportSummary:
    """What was written: the bundle's folder, T and K, bytes and seconds of each part.

    `cache` is the rows of the KV cache in the decoder graph for engines, None where there is no such graph;
    `engine_refused` and `quantisation` as in the manifest. `curve` is how K was found, where it was searched;
    `selector` what was chosen, with the calibration behind it. `report`: the page's name in the bundle. `shared`: the
    bundle whose decoder files are this one's, too.
    """

    bundle: Path
    tokens: int
    keep: int
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cache: int | None = None
    engine_refused: str | None = None
    quantisation: QuantisationInfo | None = None
    curve: KeepCurve | None = None
    selector: Chosen | None = None
    report: str | None = None
    shared: Path | None = None
