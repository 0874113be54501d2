"""The golden case of a bundle: one picture and question, answered at export by the checkpoint itself."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.positions import Span
from svdprune.runtime.prompt import Pictured


@dataclass(frozen=True)
class Golden:
    """The golden case: ids of the prompt and the answer, float32 features [K, H], scores [T], logits [V].

    ``ended`` tells that the model itself ended the answer there, so that going on is a fault, too. ``span`` says which
    of the unpruned picture's rows the features are: those of the kept indices, unless it is in tiles. ``deepstack``
    float32 [L, rows, H] goes with the features where the decoder takes such levels.
    """

    picture: Path
    question: str
    prompt_ids: list[int]
    answer: str
    answer_ids: list[int]
    positions: str
    ended: bool
    reference: str
    kept: np.ndarray
    features: np.ndarray
    scores: np.ndarray
    logits: np.ndarray
    span: Span
    deepstack: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """int64 [rows], ascending: which rows of the unpruned picture's the features are."""
        return self.span.kept

    @property
    def total(self) -> int:
        """Rows of the unpruned picture."""
        return self.span.total

    @property
    def pictured(self) -> Pictured:
        """The picture as a prompt takes it."""
        return Pictured(self.span, self.features, self.deepstack)


def read_golden(bundle: Bundle) -> Golden:
    """The golden case of an opened bundle.

    Raises:
        BundleError: it cannot be read, lacks a part, or does not fit the manifest.
    """
    names, info = bundle.manifest.golden, bundle.manifest
    case = bundle.read_json(names.case)
    path = bundle.file(names.arrays)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, scores, logits = (np.asarray(arrays[name]) for name in ("features", "scores", "logits"))
            more = {name: np.asarray(arrays[name]) for name in ("positions", "deepstack") if name in arrays}
        golden = Golden(
            picture=bundle.file(names.image),
            question=case["question"],
            prompt_ids=[int(token) for token in case["prompt_ids"]],
            answer=case["answer"],
            answer_ids=[int(token) for token in case["answer_ids"]],
            positions=case["positions"],
            ended=case.get("stopped") == "eos",
            reference=case.get("dtype", "float32"),
            kept=np.asarray(case["kept_indices"], np.int64),
            features=features,
            scores=scores,
            logits=logits,
            span=Span(
                np.asarray(case.get("places", case["kept_indices"]), np.int64),
                int(case.get("total", info.vision.tokens)),
                more.get("positions"),
                case.get("advance"),
            ),
            deepstack=more.get("deepstack"),
        )
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} or its case cannot be read ({error}): export the bundle again") from error
    vision, decoder = info.vision, info.decoder
    keep, tokens = vision.keep, vision.tokens
    if vision.tiles is not None:  # a picture's own
        keep, tokens = len(golden.kept), len(golden.scores)
    rows = len(golden.places)
    shapes: list[tuple[str, np.ndarray, tuple[int, ...]]] = []
    if decoder.position_axes > 1:
        if golden.span.positions is None or golden.span.advance is None:
            raise BundleError(f"{path} or its case lacks the rows' positions: export the bundle again")
        shapes.append(("positions", golden.span.positions, (rows, decoder.position_axes)))
    if golden.deepstack is not None:
        shapes.append(("deepstack", golden.deepstack, (decoder.deepstack, rows, decoder.hidden)))
    for name, array, shape in (
        *shapes,
        ("features", golden.features, (rows, vision.hidden)),
        ("scores", golden.scores, (tokens,)),
        ("logits", golden.logits, (decoder.vocab,)),
        ("kept_indices", golden.kept, (keep,)),
    ):
        if array.shape != shape:
            raise BundleError(f"{path}: {name} is {list(array.shape)}, not {list(shape)}: export the bundle again")
    return golden
