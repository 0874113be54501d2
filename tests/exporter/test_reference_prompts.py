"""The reference's language half, called with rows, against each whole model of transformers called with ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from svdprune.exporter.golden import reference_answer
from svdprune.exporter.tiled_reference import embedder
from svdprune.runtime.arrays import host_rows
from svdprune.runtime.decoder.transformers import language_logits
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Mask
from svdprune.runtime.positions import Layout, Span
from svdprune.runtime.prompt import Pictured, run_of
from tests.exporter import gemma_models, qwen_models

SAVES: dict[str, Callable[[Path], Path]] = {
    "paligemma": gemma_models.save_paligemma,
    "paligemma2": gemma_models.save_paligemma2,
    "gemma3": gemma_models.save_gemma3,
    "qwen2_5_vl": qwen_models.save_qwen2_5,
    "qwen3_vl": qwen_models.save_qwen3,
}
GRIDS = [(2, 3), (3, 2)]  # rows and columns of tokens of the two pictures
TEXT = [(5, 9), (6,), (7, 11, 4)]  # ids before, between and after them


@pytest.fixture(scope="module", params=list(SAVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = SAVES[name](tmp_path_factory.mktemp(name))
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def case(name: str, model: Any) -> tuple[list[int], list[Pictured], Layout]:
    """A prompt with two pictures of random features, every token kept: ids, pictures, layout."""
    random = np.random.default_rng(0)
    text = model.config.get_text_config()
    image, qwen = model.config.image_token_id, name.startswith("qwen")
    levels = len(model.config.vision_config.deepstack_visual_indexes) if name == "qwen3_vl" else 0
    pictures = []
    for rows, columns in GRIDS:
        count = rows * columns
        span = Span(np.arange(count), count)
        if qwen:
            where = np.stack([np.zeros(count, np.int64), *np.divmod(np.arange(count), columns)], 1)
            span = Span(np.arange(count), count, where, max(rows, columns))
        features = random.normal(size=(count, text.hidden_size)).astype(np.float32)
        deepstack = random.normal(size=(levels, *features.shape)).astype(np.float32) if levels else None
        pictures.append(Pictured(span, features, deepstack))
    ids = [*TEXT[0], image, *TEXT[1], image, *TEXT[2]]
    mask: Mask = "causal" if qwen else "picture" if name == "gemma3" else "prefix"
    spans = tuple(picture.span for picture in pictures)
    return ids, pictures, Layout((2, 4), spans, "original", 3 if qwen else 1, mask)


@torch.no_grad()
def whole(name: str, model: Any, ids: list[int], pictures: list[Pictured], answer: list[int]) -> np.ndarray:
    """Logits after the answer so far by the whole model, which counts positions and masks on its own."""
    image, numbers = model.config.image_token_id, iter(pictures)
    spread = [token for i in ids for token in ([i] * (next(numbers).span.total if i == image else 1))] + answer
    tokens = torch.tensor([spread])
    types = (tokens == image).long()
    rows = [torch.from_numpy(host_rows([picture.features])) for picture in pictures]
    more: dict[str, Any] = {}
    outputs = BaseModelOutputWithPooling(pooler_output=rows)
    if name.startswith("qwen"):
        merge = model.config.vision_config.spatial_merge_size
        grids = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in GRIDS])
        more = {"mm_token_type_ids": types, "image_grid_thw": grids}
        if name == "qwen3_vl":
            stacks = [picture.deepstack for picture in pictures if picture.deepstack is not None]
            outputs.deepstack_features = [
                tuple(torch.from_numpy(stack[level]) for stack in stacks) for level in range(len(stacks[0]))
            ]
    else:
        outputs = BaseModelOutputWithPooling(pooler_output=torch.cat(rows)[None])
        more = {"token_type_ids": types}
        if name.startswith("paligemma"):  # 0 is the prompt, 1 the answer
            more = {"token_type_ids": (torch.arange(len(spread)) >= len(spread) - len(answer)).long()[None]}
    out = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_encoder_outputs={"image": outputs},
        use_cache=False,
        **more,
    )
    logits: np.ndarray = out.logits[0, -1].numpy()
    return logits


def test_rows_give_the_logits_of_the_whole_model(name: str, model: Any) -> None:
    ids, pictures, layout = case(name, model)
    answer, stopped, first = reference_answer(model, layout, ids, pictures, [], limit=5)
    assert (len(answer), stopped) == (5, "length")
    np.testing.assert_allclose(first, whole(name, model, ids, pictures, []), atol=2e-4)
    for count in range(1, 5):
        assert answer[count] == int(whole(name, model, ids, pictures, answer[:count]).argmax())


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_vl"], indirect=True, scope="module")
def test_a_picture_after_rows_in_the_cache(name: str, model: Any) -> None:
    """As in a later turn of a chat: what a picture's rows see is the same when the rows before it are in the cache.

    With the mask of a whole prompt another prompt changes every row: there the runtime computes all of them anew.
    """
    ids, pictures, layout = case(name, model)
    embed = embedder(model)
    cache = DynamicCache()
    with torch.no_grad():
        for part in (ids[:4], ids):
            run = run_of(layout, part, 0 if part is not ids else 4, pictures, embed)
            rows = torch.from_numpy(host_rows(run.embeds))[None]
            logits = language_logits(model, rows, run.positions, cache, run.deepstack, run.groups)
    np.testing.assert_allclose(logits.numpy(), whole(name, model, ids, pictures, []), atol=2e-4)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"], indirect=True, scope="module")
def test_masks_are_not_left_out_silently(name: str, model: Any) -> None:
    """Without its groups a picture would be answered otherwise; a language model alone has no masks for them."""
    ids, pictures, layout = case(name, model)
    run = run_of(layout, ids, 0, pictures, embedder(model))
    rows = torch.from_numpy(host_rows(run.embeds))[None]
    with torch.no_grad():
        causal = language_logits(model, rows, run.positions, DynamicCache())
    assert np.abs(causal.numpy() - whole(name, model, ids, pictures, [])).max() > 1e-3

    alone = SimpleNamespace(model=(language := object()), config=model.config, get_decoder=lambda: language)
    with pytest.raises(UserError, match="give the whole checkpoint"):
        language_logits(alone, rows, run.positions, DynamicCache(), None, run.groups)
