"""What a quantised graph changes in answers, by the reference language model, and all of it for the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from svdprune.calib.quantise import Seen
from svdprune.exporter.golden import reference_answer
from svdprune.exporter.quantise.plan import Plan
from svdprune.exporter.quantise.vision import Quantised
from svdprune.exporter.tiled_reference import embedder
from svdprune.runtime.manifest import BlockSensitivity, DecoderInfo, Positions, QuantisationInfo
from svdprune.runtime.positions import Span
from svdprune.runtime.prompt import Pictured, layout_of
from svdprune.runtime.text import TextProcessor, user_message
from svdprune.runtime.tiling.feed import Prepared
from svdprune.runtime.tiling.pictured import pictured
from svdprune.runtime.tiling.slots import Chosen


@dataclass(frozen=True)
class Asker:
    """The reference language model, and how a bundle puts a picture into its prompt.

    Attributes:
        model: the whole model by transformers. decoder: how its rows are placed and masked.
        marks: float32 (E, H), rows between the tokens of tiles, where there are such.
    """

    model: nn.Module
    text: TextProcessor
    decoder: DecoderInfo
    positions: Positions
    marks: np.ndarray | None = None

    @torch.no_grad()
    def first_token(self, question: str, picture: Prepared, seen: Seen) -> int:
        """The most likely first token of the answer, from a vision graph's features."""
        if picture.cut is None:
            made = Pictured(Span(seen.kept, len(seen.scores)), seen.features, seen.deepstack)
        else:
            found = Chosen(seen.kept, seen.features, seen.scores, seen.deepstack)
            made = pictured(picture.cut, found, embedder(self.model), self.marks)
        prompt = self.text.prompt_ids([user_message(question, picture=True)])
        layout = layout_of(prompt, [made], self.positions, self.decoder, self.text.image_token_id)
        _, _, logits = reference_answer(self.model, layout, prompt, [made], [], limit=1)
        return int(logits.argmax())


def first_token_agreement(
    asker: Asker, questions: Sequence[tuple[Prepared, str]], plain: Sequence[Seen], seen: Sequence[Seen]
) -> float:
    """Share of questions whose first answer token is the same from two graphs' features, a question a picture."""
    same = [
        asker.first_token(question, picture, ours) == asker.first_token(question, picture, theirs)
        for (picture, question), ours, theirs in zip(questions, seen, plain, strict=True)
    ]
    return float(np.mean(same))


def measured(quantised: Quantised, plan: Plan, asker: Asker) -> QuantisationInfo:
    """The manifest's entry."""
    change = quantised.change
    return QuantisationInfo(
        float_type=plan.float_type,
        ranges=quantised.rule,
        source=plan.source,
        calibrated_on=len(plan.calibration),
        swept_on=len(plan.swept),
        pictures=len(plan.held_out),
        questions=len(plan.held_out),
        blocks=len(quantised.blocks),
        float_blocks=quantised.float_blocks,
        target_met=quantised.met,
        cosine=change.cosine,
        overlap=change.overlap,
        worst_overlap=change.worst_overlap,
        scores=change.scores,
        agreement=first_token_agreement(asker, plan.held_out, quantised.plain, quantised.seen),
        size_ratio=quantised.size_ratio,
        sensitivity=[
            BlockSensitivity(item.block, item.change.cosine, item.change.overlap, item.change.scores)
            for item in quantised.sensitivity
        ],
    )
