"""The reference of a picture in tiles: the tower and projector of transformers, the selection in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.exporter.tiled import EMPTY
from svdprune.runtime.answer import Sight
from svdprune.runtime.errors import NumericalError
from svdprune.runtime.preprocess import ImageSettings, normalise
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.tiling.pictured import sight_of
from svdprune.runtime.tiling.slots import chosen, lay_out


@torch.no_grad()
def reference_tiles(
    model: nn.Module,
    family: Family,
    spec: VisionSpec,
    picture: Image.Image,
    images: ImageSettings,
    selector: SelectorConfig,
    keep: int,
    start: np.ndarray | None = None,
    marks: np.ndarray | None = None,
) -> Sight:
    """What `Vlm.see` gives for an RGB picture, by transformers and torch.

    Args:
        images: with the family's tiling. marks: float32 (E, H), the bundle's.

    Raises:
        NumericalError: the checkpoint's own features hold NaN or infinity.
    """
    tiles = spec.tiles()
    assert tiles is not None and images.tiling is not None  # who calls this has seen that there are tiles
    dtype = next(model.parameters()).dtype
    cut = tiling_of(images.tiling).cut(picture, images.resample)
    slots = lay_out(cut, tiles, spec.tokens)
    pixels = torch.from_numpy(normalise(cut.pixels, images)).to(dtype)
    extras = [torch.from_numpy(cut.extras[name]) for name in spec.extras]
    tokens, attention = family.reference_tokens(model, pixels, *extras)
    if not tokens.isfinite().all():
        raise NumericalError("the checkpoint's vision features hold NaN or infinity: its weights are damaged")
    flat, sources, weights = tokens.flatten(0, 1), torch.from_numpy(slots.sources), torch.from_numpy(slots.weights)
    rows = (flat[sources].float() * weights[..., None]).sum(2)  # (G, S, D)
    seen = None if attention is None else (attention.float().flatten()[sources] * weights).sum(2)
    scorer = build_selector(
        selector,
        tokens=spec.tokens,
        channels=spec.channels,
        grid=spec.selection_grid,
        keep=keep,
        start=start,
        padded=True,
    )
    scores = scorer(rows, seen).masked_fill(weights.sum(2) <= 0, EMPTY)
    kept = np.stack([keep_indices(row, keep) for row in scores.numpy()])  # (G, K)
    features = [
        (family.reference_project(model, flat[sources[group, index]]).float() * weights[group, index][..., None]).sum(1)
        for group, index in enumerate(kept)
    ]
    deepstack = None
    if spec.deepstack:
        levels = family.reference_levels(model, pixels, *extras).flatten(0, 1)  # (N * T, L * D)
        stacked = family.reference_deepstack(model, levels[sources[torch.arange(len(kept))[:, None], kept, 0]])
        deepstack = stacked.float().numpy()
    found = chosen(slots, torch.stack(features).numpy(), kept, scores.numpy(), len(cut.places), deepstack)
    return sight_of(cut, found, embedder(model), marks)


def embedder(model: nn.Module) -> Callable[[Sequence[int]], np.ndarray]:
    """Looks up token embeddings float32 (n, H) in a model by transformers."""

    def embed(ids: Sequence[int]) -> np.ndarray:
        table = model.get_input_embeddings()  # type: ignore[operator]
        looked: torch.Tensor = table(torch.tensor(list(ids), dtype=torch.long))
        return looked.detach().float().numpy()

    return embed
