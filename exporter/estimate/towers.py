"""Vision towers by the `model_type` of their config: one small reader each.

A reader gets transformers' config object (so what config.json leaves out has transformers' default), and returns the
sizes. To add a tower: write its reader and give it a line in `TOWERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from svdprune.exporter.estimate.shapes import Tower
from svdprune.runtime.errors import UserError

Picture = tuple[int, int] | None
"""(width, height) in pixels, or None where nobody said."""

Reader = Callable[[Any, int, Picture], Tower]
"""(vision config, layers to run, picture) -> sizes."""


def read_tower(config: Any, run: int | None, picture: Picture) -> Tower:
    """The sizes of a tower.

    Args:
        config: transformers' config object of it.
        run: layers that the exported graph keeps; None for all.
        picture: its size, for a tower that takes any; None otherwise.

    Raises:
        UserError: a tower that is not known; a tower of free size without a picture, or one of fixed size with another.
    """
    kind = config.model_type
    if kind not in TOWERS:
        raise UserError(f"the vision tower is of type {kind!r}; the estimate knows: {', '.join(TOWERS)}")
    layers = int(getattr(config, "num_hidden_layers", None) or config.depth)
    if run is not None and not 1 <= run <= layers:
        raise UserError(f"the vision feature layer asks for {run} layers of a vision tower of {layers}")
    return TOWERS[kind](config, layers if run is None else run, picture)


def _clip(c: Any, run: int, picture: Picture) -> Tower:
    height, width = _fixed(c, picture)
    patches = (height // c.patch_size) * (width // c.patch_size)
    fixed = c.num_channels * c.patch_size**2 * c.hidden_size  # the patch embedding, without a bias
    fixed += (1 + patches) * c.hidden_size + c.hidden_size + 2 * c.hidden_size  # positions, [CLS], the norm before
    return Tower(
        height, width, c.patch_size, c.num_channels, 1, c.hidden_size, c.intermediate_size, c.num_attention_heads,
        c.num_hidden_layers, run, prefix=1, taken=patches, fixed=fixed,
    )  # fmt: skip


def _siglip(c: Any, run: int, picture: Picture) -> Tower:
    height, width = _fixed(c, picture)
    patches = (height // c.patch_size) * (width // c.patch_size)
    fixed = (c.num_channels * c.patch_size**2 + 1) * c.hidden_size + patches * c.hidden_size
    return Tower(
        height, width, c.patch_size, c.num_channels, 1, c.hidden_size, c.intermediate_size, c.num_attention_heads,
        c.num_hidden_layers, run, prefix=0, taken=patches, fixed=fixed,
    )  # fmt: skip


def _dinov2(c: Any, run: int, picture: Picture) -> Tower:
    """For pictures of any size in whole patches; the table of positions is the picture's, not the checkpoint's."""
    patch = _one(c.patch_size, "patch")
    width, height = picture if picture is not None else _fixed(c, None)[::-1]
    if height % patch or width % patch:
        raise UserError(f"a picture of {width} x {height} is no whole number of the vision tower's patches of {patch}")
    if c.use_swiglu_ffn:
        raise UserError("a DINOv2 with SwiGLU layers is not supported")
    patches = (height // patch) * (width // patch)
    fixed = (c.num_channels * patch**2 + 1 + 1 + 1 + patches) * c.hidden_size  # patch embedding, [CLS], positions
    return Tower(
        height, width, patch, c.num_channels, 1, c.hidden_size, int(c.hidden_size * c.mlp_ratio),
        c.num_attention_heads, c.num_hidden_layers, run, prefix=1, taken=patches, fixed=fixed, qkv_bias=c.qkv_bias,
        layer_extra=2 * c.hidden_size,  # layer scale twice
    )  # fmt: skip


def _idefics(c: Any, run: int, picture: Picture) -> Tower:
    """SigLIP's, and the norm after its last layer."""
    plain = _siglip(c, run, picture)
    return replace(plain, fixed=plain.fixed + 2 * plain.dim)


def _internvl(c: Any, run: int, picture: Picture) -> Tower:
    height, width = _fixed(c, picture)
    patch = _one(c.patch_size, "patch")
    patches = (height // patch) * (width // patch)
    fixed = (c.num_channels * patch**2 + 1) * c.hidden_size + c.hidden_size  # the patch embedding and [CLS]
    fixed += (1 + patches) * c.hidden_size if c.use_absolute_position_embeddings else 0
    fixed += 0 if c.use_mean_pooling else 2 * c.hidden_size
    return Tower(
        height, width, patch, c.num_channels, 1, c.hidden_size, c.intermediate_size, c.num_attention_heads,
        c.num_hidden_layers, run, prefix=1, taken=patches, fixed=fixed, qkv_bias=c.attention_bias,
        norm=1 if c.norm_type == "rms_norm" else 2,
        layer_extra=(4 if c.use_qk_norm else 2) * c.hidden_size,  # layer scale twice; norms of queries and keys
    )  # fmt: skip


def _qwen3_vl(c: Any, run: int, picture: Picture) -> Tower:
    height, width = _free(c, picture)
    patches = (height // c.patch_size) * (width // c.patch_size)
    fixed = (c.in_channels * c.temporal_patch_size * c.patch_size**2 + 1 + c.num_position_embeddings) * c.hidden_size
    return Tower(
        height, width, c.patch_size, c.in_channels, c.temporal_patch_size, c.hidden_size, c.intermediate_size,
        c.num_heads, c.depth, run, prefix=0, taken=patches, fixed=fixed,
    )  # fmt: skip


def _qwen2_5_vl(c: Any, run: int, picture: Picture) -> Tower:
    height, width = _free(c, picture)
    patches = (height // c.patch_size) * (width // c.patch_size)
    return Tower(
        height, width, c.patch_size, c.in_channels, c.temporal_patch_size, c.hidden_size, c.intermediate_size,
        c.num_heads, c.depth, run, prefix=0, taken=patches,
        fixed=c.in_channels * c.temporal_patch_size * c.patch_size**2 * c.hidden_size,
        gated=True, norm=1,
        windowed=run - len([block for block in c.fullatt_block_indexes if block < run]),
        window=(c.window_size // c.patch_size) ** 2,
    )  # fmt: skip


TOWERS: dict[str, Reader] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "dinov2": _dinov2,
    "idefics3_vision": _idefics,
    "smolvlm_vision": _idefics,
    "internvl_vision": _internvl,
    "qwen2_5_vl_vision": _qwen2_5_vl,
    "qwen3_vl_vision": _qwen3_vl,
}


def _fixed(c: Any, picture: Picture) -> tuple[int, int]:
    """(height, width) of a tower that takes one size only."""
    size = c.image_size
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if picture is not None and picture != (width, height):
        raise UserError(
            f"the vision tower takes crops of {width} x {height} and no others: leave out --picture, and say with "
            "--crops into how many the picture is cut"
        )
    return height, width


def _free(c: Any, picture: Picture) -> tuple[int, int]:
    """(height, width) of a tower that takes any size: the picture's, in whole merged patches."""
    if picture is None:
        raise UserError("this model takes pictures of any size: say which with --picture, for example 640x480")
    cell = c.patch_size * c.spatial_merge_size
    width, height = (max(cell, round(side / cell) * cell) for side in picture)
    return height, width


def _one(value: Any, what: str) -> int:
    sides = {value} if isinstance(value, int) else {int(side) for side in value}
    if len(sides) != 1:
        raise UserError(f"a {what} of {' x '.join(map(str, value))} pixels is not square, which the estimate needs")
    return sides.pop()
