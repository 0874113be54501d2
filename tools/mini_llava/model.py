"""The architecture of `mini-llava`, and a forward pass that can also read a window of the full patch grid."""

from __future__ import annotations

import math

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_SIZE, PATCH_SIZE = 336, 14
GRID = IMAGE_SIZE // PATCH_SIZE
FEATURE_LAYER = -2


def build(vocab_size: int, image_token_id: int, bos: int, eos: int, pad: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model, float32."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
    )
    text = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # CLIP's own initialisation makes positions 20 times weaker than patches: start them on the patches' scale.
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions[1:] = 0.35 * _sinusoids(vision.hidden_size)
    return model


def _sinusoids(dim: int) -> torch.Tensor:
    """Two-dimensional sine-cosine positions of the grid in raster order: (GRID * GRID, dim)."""
    frequency = torch.exp(torch.linspace(math.log(math.pi / GRID), math.log(math.pi / 2), dim // 4))
    angle = torch.arange(GRID)[:, None] * frequency  # (GRID, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (GRID, dim / 2)
    rows = axis[:, None].expand(GRID, GRID, -1)
    columns = axis[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def encode(model: LlavaForConditionalGeneration, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states at the feature layer, [CLS] first.

    pixels float (B, 3, h, w), normalised; positions int64 (B, T): which cell of the full grid each patch is,
    so that a window trains the same position embeddings as the full picture. Returns (B, 1 + T, D).
    Layers after the feature layer are not run.
    """
    tower = model.model.vision_tower
    table = tower.embeddings.position_embedding.weight
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, T, D)
    patches = patches + table[1 + positions]
    first = (tower.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, patches], 1))
    for layer in tower.encoder.layers[: FEATURE_LAYER + 1]:
        hidden = layer(hidden, None)
    return hidden
