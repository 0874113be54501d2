"""What a quantised graph changes in answers, by the reference language model, and all of it for the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from svdprune.calib.quantise import Seen
from svdprune.exporter.golden import reference_answer
from svdprune.exporter.quantise.plan import Plan
from svdprune.exporter.quantise.vision import Quantised
from svdprune.runtime.manifest import BlockSensitivity, Positions, QuantisationInfo
from svdprune.runtime.positions import one_picture, picture_place
from svdprune.runtime.prompt import Pictured
from svdprune.runtime.text import TextProcessor, user_message


@torch.no_grad()
def first_token(
    model: nn.Module, text: TextProcessor, question: str, seen: Seen, tokens: int, positions: Positions
) -> int:
    """The most likely first token of the answer, by transformers, from a vision graph's features."""
    prompt = text.prompt_ids([user_message(question, picture=True)])
    layout = one_picture(picture_place(prompt, text.image_token_id), seen.kept, tokens, positions)
    pictures = [Pictured(layout.spans[0], seen.features)]
    _, _, logits = reference_answer(model, layout, prompt, pictures, [], limit=1)
    return int(logits.argmax())


def first_token_agreement(
    model: nn.Module,
    text: TextProcessor,
    questions: Sequence[str],
    plain: Sequence[Seen],
    seen: Sequence[Seen],
    tokens: int,
    positions: Positions,
) -> float:
    """Share of questions whose first answer token is the same from two graphs' features, a question a picture."""
    same = [
        first_token(model, text, question, ours, tokens, positions)
        == first_token(model, text, question, theirs, tokens, positions)
        for question, ours, theirs in zip(questions, seen, plain, strict=True)
    ]
    return float(np.mean(same))


def measured(
    quantised: Quantised, plan: Plan, model: nn.Module, text: TextProcessor, tokens: int, positions: Positions
) -> QuantisationInfo:
    """The manifest's entry.

    Args:
        model: the whole model by transformers. tokens: T, of the unpruned picture.
    """
    questions = [question for _, question in plan.held_out]
    change = quantised.change
    return QuantisationInfo(
        float_type=plan.float_type,
        ranges=quantised.rule,
        source=plan.source,
        calibrated_on=len(plan.calibration),
        swept_on=len(plan.swept),
        pictures=len(plan.held_out),
        questions=len(questions),
        blocks=len(quantised.blocks),
        float_blocks=quantised.float_blocks,
        target_met=quantised.met,
        cosine=change.cosine,
        overlap=change.overlap,
        worst_overlap=change.worst_overlap,
        scores=change.scores,
        agreement=first_token_agreement(model, text, questions, quantised.plain, quantised.seen, tokens, positions),
        size_ratio=quantised.size_ratio,
        sensitivity=[
            BlockSensitivity(item.block, item.change.cosine, item.change.overlap, item.change.scores)
            for item in quantised.sensitivity
        ],
    )
