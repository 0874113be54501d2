"""A checkpoint in torch, cut as the exporter cuts it: pictures to tokens, tokens to rows, text to ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, family_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.processor import image_values, write_processor
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.text import TextProcessor, user_message


@dataclass
class Seen:
    """One encoded picture: features (1, T, D) and [CLS] attention (1, T) at the checkpoint's tap, and at others.

    The attention is None where the encoder has no [CLS].
    """

    tokens: torch.Tensor
    attention: torch.Tensor | None
    taps: dict[int | str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def at(self, tap: int | str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (1, T, D) and attention (1, T) to be scored."""
        return (self.tokens, self.attention) if tap is None else self.taps[tap]


class Eyes:
    """The vision part of a checkpoint alone; of its weights, no others are read.

    Attributes:
        spec: its sizes.
        device, dtype: where it lies and what it computes in.
    """

    def __init__(
        self, checkpoint: Checkpoint, where: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.family = family_of(checkpoint.config, where)
        self.spec = self.family.describe(checkpoint)
        if self.spec.tiling is not None:
            raise UserError(
                f"{where} cuts pictures into tiles, which an evaluation in torch does not do: "
                "export it and evaluate the bundle on labelled data"
            )
        self.encoder = self.family.encoder(checkpoint).to(self.device, self.dtype)
        self.projector = self.family.projector(checkpoint).to(self.device, self.dtype)
        self._others: dict[int | str, torch.nn.Module] = {}
        self.images = ImageSettings.from_json(image_values(checkpoint))

    def add_tap(self, tap: int) -> None:
        """Prepare to score features of another hidden state, `tap` counted as the config's vision_feature_layer."""
        other = Checkpoint(self.checkpoint.folder)
        other.config["vision_feature_layer"] = tap
        if self.family.describe(other).tap != tap:
            raise UserError(f"the family {self.family.name} does not name its tap by a layer: leave out tap={tap}")
        self._others[tap] = self.family.encoder(other).to(self.device, self.dtype)

    @torch.no_grad()
    def see(self, image: Image.Image, projected: bool = False) -> Seen:
        """Encode a picture once, at every tap that was added; `projected` adds the rows after the projector.

        Raises:
            NumericalError: the features hold NaN or infinity.
        """
        pixels = torch.from_numpy(normalise(preprocess(image, self.images), self.images))[None]
        pixels = pixels.to(self.device, self.dtype)
        tokens, attention = self.encoder(pixels)
        if not tokens.isfinite().all():
            raise NumericalError("the vision features hold NaN or infinity: the checkpoint's weights are damaged")
        seen = Seen(tokens, attention)
        for tap, encoder in self._others.items():
            seen.taps[tap] = encoder(pixels)
        if projected:
            seen.taps["projected"] = (self.projector(tokens), attention)
        return seen

    @torch.no_grad()
    def rows(self, seen: Seen, kept: torch.Tensor) -> torch.Tensor:
        """Projected features (K, H) of the tokens `kept` (K,)."""
        return self.projector(seen.tokens[:, kept.to(self.device)])[0]


class Model(Eyes):
    """The parts of a checkpoint that an evaluation runs, in float32 where that fits the memory.

    Attributes:
        language, head: the language model and its output projection, as transformers builds them.
        text: tokenizer and chat template.
        eos: ids that end an answer.
    """

    def __init__(
        self, checkpoint: Checkpoint, where: str, device: str = "cpu", report: Any = lambda note: None
    ) -> None:
        family_of(checkpoint.config, where).describe(checkpoint)  # what is not supported is told before the weights
        reference = load_reference(checkpoint, report).to(torch.device(device))
        super().__init__(checkpoint, where, device, next(reference.parameters()).dtype)
        self.language: Any = cast(Any, reference).model.language_model
        self.head: Any = reference.lm_head
        self.text = _text(checkpoint, self.family)
        self.eos = _ends(checkpoint)

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


def _text(checkpoint: Checkpoint, family: Family) -> TextProcessor:
    """The text processor that a bundle of this checkpoint would have."""
    with tempfile.TemporaryDirectory() as place:
        info = write_processor(checkpoint, Path(place) / "processor", picture=family.picture_text(checkpoint))
        return TextProcessor.of(info, lambda name: (Path(place) / name).read_text(encoding="utf-8"))


def _ends(checkpoint: Checkpoint) -> frozenset[int]:
    """Ids that end an answer, as the bundle's decoder has them."""
    found = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if found is None:
        found = checkpoint.config["text_config"].get("eos_token_id")
    if found is None:
        raise UserError(f"{checkpoint.folder} names no eos_token_id: it does not say when an answer ends")
    return frozenset([found] if isinstance(found, int) else found)
