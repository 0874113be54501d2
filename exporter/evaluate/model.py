"""A checkpoint in torch, cut as the exporter cuts it: pictures to tokens, tokens to rows, text to ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import decoder_config
from svdprune.exporter.evaluate.seen import Seen, Tap, View, mixed
from svdprune.exporter.families import Family, VisionSpec, family_of
from svdprune.exporter.feed import feed_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.processor import image_values, write_processor
from svdprune.runtime.arrays import host_rows
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.manifest import Positions
from svdprune.runtime.positions import Span
from svdprune.runtime.preprocess import ImageSettings
from svdprune.runtime.text import TextProcessor, user_message
from svdprune.runtime.tiling.pictured import pictured
from svdprune.runtime.tiling.slots import Chosen


class Eyes:
    """The vision part of a checkpoint alone; of its weights, no others are read.

    Attributes:
        spec: its sizes. T is the most candidates that a picture (or with the budget `tile` a tile) can have.
        device, dtype: where it lies and what it computes in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        where: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        spec: VisionSpec | None = None,
    ) -> None:
        """Read the weights; `spec` in place of the family's own, for another budget or another largest picture."""
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.family = family_of(checkpoint.config, where)
        self.spec = spec or self.family.describe(checkpoint)
        self.encoder = self.family.encoder(checkpoint).to(self.device, self.dtype)
        self.projector = self.family.projector(checkpoint).to(self.device, self.dtype)
        self._others: dict[int | str, torch.nn.Module] = {}
        self.images = replace(ImageSettings.from_json(image_values(checkpoint)), tiling=self.spec.tiling)

    def add_tap(self, tap: int) -> None:
        """Prepare to score features of another hidden state, `tap` counted as the config's vision_feature_layer."""
        self._others[tap] = self.family.encoder(at_tap(self.family, self.checkpoint, tap)).to(self.device, self.dtype)

    @torch.no_grad()
    def see(self, image: Image.Image, projected: bool = False) -> Seen:
        """Encode a picture once, at every tap that was added; `projected` adds the rows after the projector.

        Raises:
            UserError: a picture that cannot be cut into tiles.
            NumericalError: the features hold NaN or infinity.
        """
        fed = feed_of(image, self.images, self.spec, raw=False)
        pixels = torch.from_numpy(fed.inputs["pixels"]).to(self.device, self.dtype)
        extras = [torch.from_numpy(fed.inputs[name]).to(self.device) for name in self.spec.extras]  # places: float32
        tokens, attention, *_ = self.encoder(pixels, *extras)
        if not tokens.isfinite().all():
            raise NumericalError("the vision features hold NaN or infinity: the checkpoint's weights are damaged")
        seen = Seen(tokens, attention, tokens.flatten(0, 1), cut=fed.cut, slots=fed.slots)
        seen.tokens, seen.attention = _candidates(seen, tokens, attention)
        for tap, encoder in self._others.items():
            other, attended, *_ = encoder(pixels, *extras)
            seen.taps[tap] = _candidates(seen, other, attended)
        if projected:
            seen.taps["projected"] = (_candidates(seen, self.projector(tokens), None)[0], seen.attention)
        return seen

    @torch.no_grad()
    def rows(self, seen: Seen, kept: np.ndarray) -> torch.Tensor:
        """Projected features (k, H) of the candidates `kept` int64 (k,)."""
        sources, weights = seen.mixture(kept)
        used, index = np.unique(sources, return_inverse=True)
        projected = self.projector(seen.flat[torch.from_numpy(used).to(self.device)][None])[0]
        if seen.cut is None:
            return projected
        return mixed(projected, index.reshape(sources.shape), weights).to(self.dtype)


class Model(Eyes):
    """The parts of a checkpoint that an evaluation runs, in float32 where that fits the memory.

    Attributes:
        language, head: the language model and its output projection, as transformers builds them.
        text: tokenizer and chat template.
        eos: ids that end an answer.
        axes: of a position.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        where: str,
        device: str = "cpu",
        report: Any = lambda note: None,
        spec: VisionSpec | None = None,
    ) -> None:
        """See `Eyes`; `report` is told in what precision the language model is loaded."""
        family = family_of(checkpoint.config, where)  # what is not supported is told before the weights
        check_asked(family, spec or family.describe(checkpoint))
        reference = load_reference(checkpoint, report).to(torch.device(device))
        super().__init__(checkpoint, where, device, next(reference.parameters()).dtype, spec)
        self.language: Any = cast(Any, reference).get_decoder()
        self.head: Any = cast(Any, reference).get_output_embeddings()
        self.text = _text(checkpoint, self.family)
        self.eos = _ends(checkpoint)
        self.axes = decoder_config(checkpoint.config["text_config"], self.spec.deepstack, self.spec.mask).position_axes
        marks = family.marks(checkpoint)
        self._marks = None if marks is None else marks.float().numpy()

    @torch.no_grad()
    def view(self, seen: Seen, kept: np.ndarray, positions: Positions) -> View:
        """The picture of which the candidates `kept` int64 (k,), ascending, are left."""
        return self.placed(seen, kept, self.rows(seen, kept), positions)

    def placed(self, seen: Seen, kept: np.ndarray, rows: torch.Tensor, positions: Positions) -> View:
        """The same from features (k, H) of the candidates."""
        if seen.cut is None:
            return View(rows.to(self.device, self.dtype), Span(kept, seen.count), positions)
        found = Chosen(kept, rows.float().cpu().numpy(), np.zeros(seen.count, np.float32))
        made = pictured(seen.cut, found, self._embed, self._marks)
        features = torch.from_numpy(host_rows([made.features])).to(self.device, self.dtype)
        return View(features, made.span, positions)

    def whole(self, seen: Seen) -> View:
        """The unpruned picture."""
        return self.view(seen, seen.everything, self.unpruned_positions)

    @property
    def unpruned_positions(self) -> Positions:
        """The unpruned model's: of one axis, both policies say the same of all tokens."""
        return "compact" if self.axes == 1 else "original"

    def _embed(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(self.embed(ids).float().cpu().numpy())

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Token embeddings (n, H)."""
        return self.language.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=self.device))

    def prompt(self, question: str) -> list[int]:
        """Prompt ids of one question about one picture, with one picture token."""
        return self.text.prompt_ids([user_message(self.text.check_question(question), picture=True)])

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return self.text.decode([token for token in ids if token not in self.eos]).strip()


def check_asked(family: Family, spec: VisionSpec) -> None:
    """Refuse a family whose language model cannot be asked in torch from rows and places alone.

    Raises:
        UserError: naming what it would need beside them.
    """
    needs = ""
    if spec.deepstack:
        needs = "takes features of several layers (DeepStack)"
    elif spec.mask != "causal":
        needs = f"lets the rows of a picture see each other (mask `{spec.mask}`)"
    if needs:
        raise UserError(
            f"the language model of {family.name} {needs}, which evaluate, calibrate and --keep auto do not run: "
            "export it with a count, --keep N, calibrate it with --no-answers, and evaluate the bundle"
        )


def at_tap(family: Family, checkpoint: Checkpoint, tap: int) -> Checkpoint:
    """The checkpoint read at another hidden state, `tap` counted as the config's vision_feature_layer.

    Raises:
        UserError: the family does not name its tap so, or there is no such layer.
    """
    other = Checkpoint(checkpoint.folder)
    other.config["vision_feature_layer"] = tap
    if family.describe(other).tap != tap:
        raise UserError(f"the family {family.name} does not name its tap by a layer: leave out tap={tap}")
    return other


def _candidates(seen: Seen, tokens: torch.Tensor, attention: torch.Tensor | None) -> Tap:
    """Features (G, S, D) and attention (G, S) of the choices, from those of the tiles' tokens, (N, T, D) and (N, T)."""
    if seen.slots is None:
        return tokens, attention
    return seen.gathered(tokens.flatten(0, 1)), None if attention is None else seen.gathered(attention.flatten())


def _text(checkpoint: Checkpoint, family: Family) -> TextProcessor:
    """The text processor that a bundle of this checkpoint would have."""
    with tempfile.TemporaryDirectory() as place:
        info = write_processor(
            checkpoint,
            Path(place) / "processor",
            picture=family.picture_text(checkpoint),
            template=family.chat_template(checkpoint),
        )
        return TextProcessor.of(info, lambda name: (Path(place) / name).read_text(encoding="utf-8"))


def _ends(checkpoint: Checkpoint) -> frozenset[int]:
    """Ids that end an answer, as the bundle's decoder has them."""
    found = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if found is None:
        found = checkpoint.config["text_config"].get("eos_token_id")
    if found is None:
        raise UserError(f"{checkpoint.folder} names no eos_token_id: it does not say when an answer ends")
    return frozenset([found] if isinstance(found, int) else found)
