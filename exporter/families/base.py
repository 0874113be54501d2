"""What a family has to say, and the table of those there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Mask, Positions
from svdprune.runtime.tiling import TilesInfo, tiling_of, video_tiling_of

Budget = Literal["picture", "tile", "prompt"]


@dataclass(frozen=True)
class VisionSpec:
    """Sizes of the vision part, all read from the checkpoint's config.

    height, width: of the input picture, pixels. grid: rows and columns of patches; tokens: their product.
    channels: D, width of the features at the tap. hidden: H, width of the language model's embeddings.
    tap: which hidden state the features are, counted as the config counts it.
    mean, std: per channel, of pictures scaled to [0, 1].
    tiling: how a picture is cut into tiles of this size (`tiling` of image.json, see `svdprune.runtime.tiling`), None
    where it is one. pixels: the fewest and the most that the processor makes of a picture, for a family that takes any
    size. budget: K of the whole picture, of each tile, or of all pictures of a prompt together, which are at
    most `pictures`. cls: whether the encoder has a [CLS] token.
    mask: which rows of a prompt see later ones (`decoder.mask` of the manifest).
    extras: what the encoder takes beside the tiles' pixels, by name: float32 (N, *rest), with the `rest`; the tiling
    makes them. deepstack: L, how many levels of features go to the decoder's first layers. positions: the policy where
    none is asked for.
    """

    height: int
    width: int
    grid: tuple[int, int]
    channels: int
    hidden: int
    tap: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    tiling: dict[str, Any] | None = None
    pixels: tuple[int, int] | None = None
    budget: Budget = "picture"
    cls: bool = True
    mask: Mask = "causal"
    extras: dict[str, list[int]] = field(default_factory=dict)
    deepstack: int = 0
    pictures: int = 1
    positions: Positions = "compact"

    @property
    def tokens(self) -> int:
        """T of one choice: of the prompt, picture or tile; the most that there can be, where that varies."""
        if self.tiling is not None and self.budget == "picture":
            return tiling_of(self.tiling).most_tokens
        if self.tiling is not None and self.budget == "prompt":
            alone, among = tiling_of(self.tiling), tiling_of(self.tiling, pictures=self.pictures)
            return max(alone.most_tokens, self.pictures * among.most_tokens)
        return self.grid[0] * self.grid[1]

    @property
    def selection_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the tokens that are chosen from; None where they lie on no one grid."""
        return None if self.tiling is not None and self.budget != "tile" else self.grid

    def most_rows(self, keep: int) -> int:
        """The most rows that a prompt's pictures have when `keep` tokens are kept: those, and marks beside them."""
        if self.tiling is None:
            return keep * self.pictures
        rows = []
        for count in {1, self.pictures}:
            tiling = tiling_of(self.tiling, pictures=count)
            each = min(keep * (tiling.limits[2] if self.budget == "tile" else 1), tiling.most_tokens)
            kept = min(keep, count * tiling.most_tokens) if self.budget == "prompt" else count * each
            rows.append(kept + count * tiling.marks_with(each))
        return max(rows)

    def tiles(self, marks: str | None = None) -> TilesInfo | None:
        """The manifest's `vision.tiles`; `marks` is the bundle's file of rows between the tokens."""
        if self.tiling is None:
            return None
        alone, among = tiling_of(self.tiling), tiling_of(self.tiling, pictures=2)
        video = video_tiling_of(self.tiling)
        count = self.pictures if self.budget == "prompt" else 1
        least, likely, most = alone.limits
        if self.budget == "prompt" and self.pictures > 1:
            likely, most = count * among.limits[1], max(most, count * among.limits[2])
        return TilesInfo(
            min(least, among.limits[0], 1 if video else least),
            likely,
            most,
            self.grid[0] * self.grid[1],
            self.budget,
            max(alone.most_sources, among.most_sources, video.most_sources if video else 1),
            marks,
            pictures=count,
            extras=self.extras,
        )


class Family(Protocol):
    """How one kind of VLM is cut: encoder up to the tap, selection, what follows it."""

    name: str
    model_types: tuple[str, ...]

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        """Sizes from the config alone; a `UserError` for a variant that is not supported, naming it."""
        ...

    def encoder(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """float (B, 3, height, width), normalised -> tokens (B, T, D) and [CLS] attention (B, T), None without [CLS].

        Everything up to the selection: the tower to its tap, and what joins tokens before they are chosen (a pixel
        shuffle). B counts tiles where there are any. Reads the weights of that part and no others; keeps their dtype.
        It takes the spec's `extras` as well, in their order. With DeepStack it gives a third value, the levels
        (B, T, L * D), side by side. One whose layers look beyond a tile has an attribute `pictures`, which is set to
        how many pictures the tiles may be of, so that none sees another.
        """
        ...

    def projector(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """What follows the selection, row by row, for any number of rows: (B, K, D) -> (B, K, H)."""
        ...

    def deepstack(self, checkpoint: Checkpoint) -> torch.nn.Module | None:
        """What follows the selection for the levels: (B, K, L * D) -> (B, L, K, H); None where there are none."""
        ...

    def marks(self, checkpoint: Checkpoint) -> torch.Tensor | None:
        """Rows (E, H) that stand between the tokens of tiles and are no tokens of the text, such as a newline's."""
        ...

    def picture_text(self, checkpoint: Checkpoint) -> tuple[str, str] | None:
        """What the chat template writes for one picture, and the text that its processor makes of it, with one image
        token; None where they are the same."""
        ...

    def chat_template(self, checkpoint: Checkpoint) -> str | None:
        """jinja2 text that says every token of a prompt, for a family whose processor has a form of its own; None where
        the checkpoint's template is the form."""
        ...

    def reference_tokens(
        self, model: torch.nn.Module, pixels: torch.Tensor, *extras: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encoder` returns first, computed by the model as transformers builds it: the check of `encoder`."""
        ...

    def reference_project(self, model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What `projector` returns, computed by the model as transformers builds it."""
        ...

    def reference_levels(self, model: torch.nn.Module, pixels: torch.Tensor, *extras: torch.Tensor) -> torch.Tensor:
        """The levels that `encoder` returns, computed by the model as transformers builds it."""
        ...

    def reference_deepstack(self, model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What `deepstack` returns, computed by the model as transformers builds it."""
        ...


class Plain:
    """What most families share."""

    def marks(self, checkpoint: Checkpoint) -> torch.Tensor | None:
        """See `Family`: none."""
        return None

    def deepstack(self, checkpoint: Checkpoint) -> torch.nn.Module | None:
        """See `Family`: none."""
        return None

    def picture_text(self, checkpoint: Checkpoint) -> tuple[str, str] | None:
        """See `Family`: the template writes the image token itself."""
        return None

    def chat_template(self, checkpoint: Checkpoint) -> str | None:
        """See `Family`: the checkpoint's own."""
        return None


_MODULES = (  # one file each, in this folder
    "llava",
    "llava_next",
    "llava_onevision",
    "idefics3",
    "internvl",
    "paligemma",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
)


_OTHER_FORMS = {"internvl_chat": "take the same model's checkpoint whose name ends in -hf"}


def _families() -> Mapping[str, Family]:
    found: dict[str, Family] = {}
    for module in _MODULES:
        family: Family = importlib.import_module(f"svdprune.exporter.families.{module}").FAMILY
        found.update(dict.fromkeys(family.model_types, family))
    return found


def supported_model_types() -> tuple[str, ...]:
    """The values of `model_type` that can be exported."""
    return tuple(_families())


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a checkpoint's `config.json`; `where` names the checkpoint in errors."""
    kind = config.get("model_type")
    families = _families()
    if isinstance(kind, str) and kind in families:
        return families[kind]
    if isinstance(kind, str) and kind in _OTHER_FORMS:
        raise UserError(
            f"{where} has model_type {kind!r}, a form that transformers does not have: {_OTHER_FORMS[kind]}"
        )
    known = ", ".join(families)
    if "vision_config" not in config:
        raise UserError(
            f"{where} is not a vision-language model (model_type {kind!r} has no vision_config): supported are {known}"
        )
    raise UserError(f"{where} has model_type {kind!r}, which is not supported yet: supported are {known}")
