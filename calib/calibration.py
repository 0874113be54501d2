"""`calibration.json` and its arrays: what a model's features were found to be, and the settings that follow.

The arrays, in `calibration.npz` beside it:

- `start`, `start_centred`: float32 (D, C), the calibrated start for raw and for centred features at the checkpoint's
  own tap, of which a selector uses the first columns;
- `energy/<tap>/raw`, `energy/<tap>/centred`: float64 (min(T, channels),), the mean share of the variance in the first
  1, 2, ... directions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from svdprune.runtime.manifest import ModelInfo

SCHEMA = 1
FILE, ARRAYS = "calibration.json", "calibration.npz"
PROJECTED = "projected"  # the tap after the projector


@dataclass(frozen=True)
class Features:
    """What the selector of the exported graph scores: T = `tokens` on a `grid` of rows and columns, D = `channels`.

    For a family that cuts pictures into tiles: T is the most that there can be, of a picture or of a tile as `budget`
    says, and the grid a tile's.
    """

    tokens: int
    channels: int
    grid: list[int]
    tap: int
    budget: str = "picture"


@dataclass(frozen=True)
class Pictures:
    """Where the pictures came from and what each was used for; no picture has two uses.

    `start` of them made the basis and the energy curves, `choice` others decided between settings, `judgement` others
    gave the figures of the settings chosen. `start_digests` tell the first apart from any others (`digest`).
    """

    source: str
    description: str
    seed: int
    limit: int
    start: int
    choice: int
    judgement: int
    questions: int
    duplicates: int
    broken: list[str]
    start_digests: list[str]


@dataclass(frozen=True)
class Wished:
    """What was asked for: `rank` or `variance`; `overlap` of the kept sets with a float64 SVD, at each K of `keep`."""

    overlap: float
    keep: list[int]
    rank: int | None = None
    variance: float | None = None
    centre: bool | None = None


@dataclass(frozen=True)
class Energy:
    """One energy curve: directions that hold a share of the variance, mean over the pictures (`ranks`, by share).

    `lowest` and `highest`: of single pictures, at `variance`.
    """

    tap: str
    centre: bool
    ranks: dict[str, int]
    variance: float
    lowest: int
    highest: int


@dataclass(frozen=True)
class Candidate:
    """Answers from the tokens that one selector keeps, against the unpruned model's; exact scores.

    `agreement`: share of greedy answers that are the same token for token, with its 95 % interval; `matched`: mean
    share of an answer's tokens before the first that differs; `kl`: of the first token, nats. `difference` of the
    agreement from that of the checkpoint's own tap, raw, with its 95 % interval; null for that one and where there are
    too few pictures to say.
    """

    label: str
    keep: int
    questions: int
    agreement: float
    low: float
    high: float
    matched: float
    kl: float
    tap: str | None = None
    centre: bool | None = None
    rank: int | None = None
    difference: list[float] | None = None


@dataclass(frozen=True)
class Trial:
    """The kept sets of one approximation against those of a float64 SVD: mean overlap over the pictures, and the worst.

    Of several K, the one where it is least. `kernels` that follow one another, and `flops`, of the selection.
    """

    iterations: int
    block: int
    start: str
    overlap: float
    worst: float
    kernels: int
    flops: float


@dataclass(frozen=True)
class Settings:
    """What an export takes over."""

    rank: int
    block: int
    iterations: int
    centre: bool


@dataclass(frozen=True)
class Arrays:
    """The file of arrays beside `calibration.json`."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Calibration:
    """All of `calibration.json`.

    Attributes:
        model: whose features these are.
        energy: one entry a tap, raw and centred.
        criterion: how tap and centring were compared, in words. candidates: what was compared, empty where there was
            no language model to ask.
        best_tap: the tap whose scores serve best by the criterion.
        trials: what was tried to reach the wished overlap, cheapest first; `met` whether the last one reached it.
        judged: the chosen settings, then the defaults with and without the calibrated start, on other pictures.
        settings: what was chosen.
    """

    model: ModelInfo
    features: Features
    pictures: Pictures
    wished: Wished
    energy: list[Energy]
    criterion: str
    candidates: list[Candidate]
    best_tap: str
    trials: list[Trial]
    met: bool
    judged: list[Trial]
    settings: Settings
    arrays: Arrays
    written_by: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON, schema first."""
        content = dataclasses.asdict(self)
        return json.dumps({"schema": content.pop("schema"), **content}, indent=2, allow_nan=False) + "\n"


def digest(picture: np.ndarray) -> str:
    """32 hex digits that tell a decoded picture, uint8 (height, width, 3), from every other."""
    head = f"{picture.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(picture, np.uint8).tobytes()).hexdigest()[:32]
