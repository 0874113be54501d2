"""The golden case: one picture and one question, answered by transformers at export.

The device replays it (`svdprune verify`) to know that its engines compute what the checkpoint computes.
Features come from transformers' own tower, not from the one in `families`, so the two check each other.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from svdprune.calib.scenes import ask, draw_scene
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.exporter.tiled_reference import embedder, reference_tiles
from svdprune.runtime.answer import Sight
from svdprune.runtime.arrays import host_rows
from svdprune.runtime.decoder.transformers import language_logits
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.manifest import DecoderInfo, GoldenInfo, Positions
from svdprune.runtime.positions import Layout, Span
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.prompt import Pictured, Run, layout_of, run_of
from svdprune.runtime.template import Message
from svdprune.runtime.text import TextProcessor

SEED = 20260411
MAX_NEW_TOKENS = 24
HEADROOM = 0.8  # share of the free memory that the reference model may take


@dataclass(frozen=True)
class Vision:
    """Reference features of one picture: pruned (K, H), kept indices (K,), scores (T,).

    `span` says which of the unpruned picture's rows the features are: a picture in tiles has more rows than kept
    tokens. `deepstack` (L, rows, H) goes with them where the decoder takes such levels.
    """

    features: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    span: Span
    deepstack: np.ndarray | None = None

    @property
    def pictured(self) -> Pictured:
        """The picture as a prompt takes it."""
        return Pictured(self.span, self.features, self.deepstack)


def golden_case() -> tuple[Image.Image, str]:
    """The picture and its question; the same for every model, drawn here."""
    rng = random.Random(SEED)
    while True:
        scene = draw_scene(rng, 336, 336, (3, 3))
        question = ask(rng, scene, "color")
        if question is not None and len(scene.objects) == 3:
            return scene.image, question.text


def load_reference(checkpoint: Checkpoint, report: Callable[[str], None]) -> nn.Module:
    """The whole model by transformers, for the golden case and for nothing else.

    float32 where that fits the free memory, otherwise the checkpoint's own precision, which is reported.

    Raises:
        UserError: not even that fits; the sentence gives the sizes.
    """
    from transformers import AutoModelForImageTextToText

    weights = [checkpoint.info(name) for name in checkpoint.names()]
    full = 4 * sum(math.prod(w.shape) for w in weights)
    stored = sum(file.stat().st_size for file in {w.file for w in weights})
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    dtype: torch.dtype | str = torch.float32
    if full > HEADROOM * free:
        if stored > HEADROOM * free:
            raise UserError(
                f"the golden answer needs the whole model in memory, {stored / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free: export on a machine with more memory (the device needs none of it)"
            )
        report("reference in the checkpoint's own precision: float32 does not fit the free memory")
        dtype = "auto"
    model: nn.Module = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@torch.no_grad()
def reference_vision(
    model: nn.Module,
    family: Family,
    spec: VisionSpec,
    pixels: np.ndarray,
    selector: SelectorConfig,
    keep: int,
    start: np.ndarray | None = None,
) -> Vision:
    """Features, choice and scores of one normalised picture, float32 (3, height, width), by transformers and torch.

    Raises:
        NumericalError: the checkpoint's own features hold NaN or infinity.
    """
    dtype = next(model.parameters()).dtype
    tokens, attention = family.reference_tokens(model, torch.from_numpy(pixels)[None].to(dtype))
    if not tokens.isfinite().all():
        raise NumericalError("the checkpoint's vision features hold NaN or infinity: its weights are damaged")
    scorer = build_selector(
        selector, tokens=spec.tokens, channels=spec.channels, grid=spec.grid, keep=keep, start=start
    )
    scores = scorer(tokens.float(), None if attention is None else attention.float())  # (1, T)
    kept = keep_indices(scores[0].numpy(), keep)
    features = family.reference_project(model, tokens[:, kept])
    return Vision(features[0].float().numpy(), kept, scores[0].numpy(), Span(kept, spec.tokens))


def _of(sight: Sight) -> Vision:
    return Vision(sight.features, sight.kept_indices, sight.scores, sight.span, sight.deepstack)


@torch.no_grad()
def reference_answer(
    model: nn.Module,
    layout: Layout,
    prompt_ids: list[int],
    pictures: Sequence[Pictured],
    eos: list[int],
    limit: int = MAX_NEW_TOKENS,
) -> tuple[list[int], str, np.ndarray]:
    """Greedy answer by transformers: ids (the end token left out), why it ended, first logits float32 (V,).

    `layout` has the places of the `pictures` in the prompt; the language model is called as its own vision-language
    model calls it: positions of three axes, DeepStack levels and masks of pictures included.
    """
    dtype = next(model.parameters()).dtype
    embed = embedder(model)
    run = run_of(layout, prompt_ids, 0, pictures, embed)
    cache = DynamicCache()
    answer: list[int] = []
    first: np.ndarray | None = None
    while len(answer) < limit:
        rows = torch.from_numpy(host_rows(run.embeds))[None].to(dtype)
        logits: torch.Tensor = language_logits(model, rows, run.positions, cache, run.deepstack, run.groups)
        first = logits.numpy() if first is None else first
        token = int(logits.argmax())
        if token in eos:
            return answer, "eos", first
        answer.append(token)
        count = len(prompt_ids) + len(answer)
        run = Run(embed([token]), layout.span(count - 1, count))
    assert first is not None
    return answer, "length", first


def write_golden(
    folder: Path,
    model: nn.Module,
    family: Family,
    spec: VisionSpec,
    selector: SelectorConfig,
    keep: int,
    positions: Positions,
    images: ImageSettings,
    text: TextProcessor,
    decoder: DecoderInfo,
    start: np.ndarray | None = None,
    marks: np.ndarray | None = None,
) -> GoldenInfo:
    """Answer the golden question and write `image.png`, `case.json` and `arrays.npz` into `folder` ("golden").

    `images` has the family's tiling, and `marks` float32 (E, H) are its rows between tokens, where it has tiles.
    `decoder` says how its rows are placed and masked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture, question = golden_case()
    picture.save(folder / "image.png")
    if spec.tiling is not None:
        vision = _of(reference_tiles(model, family, spec, picture, images, selector, keep, start, marks))
    else:
        pixels = normalise(preprocess(picture, images), images)
        vision = reference_vision(model, family, spec, pixels, selector, keep, start)
    messages: list[Message] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = text.prompt_ids(messages)
    pictures = [vision.pictured]
    layout = layout_of(prompt, pictures, positions, decoder, text.image_token_id)
    ids, stopped, logits = reference_answer(model, layout, prompt, pictures, decoder.eos)
    case = {
        "question": question,
        "prompt_ids": prompt,
        "kept_indices": vision.kept.tolist(),
        "answer": text.decode(ids).lstrip(),
        "answer_ids": ids,
        "stopped": stopped,
        "positions": positions,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    arrays = {"features": vision.features, "scores": vision.scores, "logits": logits}
    if spec.tiling is not None:
        case |= {"places": vision.span.kept.tolist(), "total": vision.span.total}
    if vision.span.positions is not None:
        case |= {"advance": vision.span.advance}
        arrays["positions"] = vision.span.positions
    if vision.deepstack is not None:
        arrays["deepstack"] = vision.deepstack
    (folder / "case.json").write_text(json.dumps(case, indent=2) + "\n", encoding="utf-8")
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own options
    return GoldenInfo("golden/image.png", "golden/case.json", "golden/arrays.npz")
