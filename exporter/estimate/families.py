"""From a checkpoint's config.json to the sizes of the model, by its `model_type`.

A family says three things: how many layers of the tower run, what stands between tower and language model, and into how
many crops a picture is cut. The tower and the language model are read by their own types (`towers`, `texts`), so a
family with known parts is one function and a line in `FAMILIES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdprune.exporter.estimate.shapes import Connector, Linear, Model, Text, Tower
from svdprune.exporter.estimate.texts import read_text
from svdprune.exporter.estimate.towers import Picture, read_tower
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require


@dataclass(frozen=True)
class Family:
    """How one kind of VLM is put together. The functions get transformers' config object of the whole model.

    Attributes:
        connector: (config, tower, text) -> what stands between.
        run: config -> layers of the tower that the exported graph keeps; None for all.
        taken: (config, tower) -> tokens of a crop that are features.
        last_norm: whether the norm after the tower's last layer is run.
        crops: (config, preprocessor_config.json) -> (the most crops of a picture, why); None for always one.
    """

    connector: Callable[[Any, Tower, Text], Connector]
    run: Callable[[Any], int | None] = lambda config: None
    taken: Callable[[Any, Tower], int] = lambda config, tower: tower.taken
    crops: Callable[[Any, Mapping[str, Any]], tuple[int, str]] | None = None
    last_norm: bool = False


def read_model(
    name: str,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None = None,
    *,
    picture: Picture = None,
    crops: int | None = None,
) -> Model:
    """The sizes of the model that `config` (a config.json) describes; what it leaves out has transformers' defaults.

    Args:
        name: what to call it.
        preprocessor: preprocessor_config.json (or the image part of processor_config.json), where there is one.
        picture: (width, height) in pixels, for a model that takes pictures of any size.
        crops: how many crops the picture is cut into; None for the most that the checkpoint allows.

    Raises:
        UserError: a family, tower or language model that is not known, a config that transformers refuses, or a picture
            that does not fit.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        what = "not a vision-language model" if "vision_config" not in config else "not known to the estimate"
        raise UserError(f"{name} has model_type {kind!r}, which is {what}: known are {', '.join(FAMILIES)}")
    family, whole = FAMILIES[kind], _transformers_config(name, config)
    text = read_text(whole.get_text_config(), _tied(config, whole))
    if picture is None and whole.vision_config.model_type == "dinov2":  # takes what its processor makes
        picture = _crop(preprocessor or {})
    tower = read_tower(whole.vision_config, family.run(whole), picture)
    tower = replace(tower, taken=family.taken(whole, tower))
    if family.last_norm:
        tower = replace(tower, fixed=tower.fixed + tower.norm * tower.dim)
    connector = family.connector(whole, tower, text)
    if tower.taken % connector.merge:
        raise UserError(f"{tower.taken} features cannot be merged by {connector.merge}: the config does not fit itself")
    notes = []
    if crops is None:
        crops, why = (1, "") if family.crops is None else family.crops(whole, preprocessor or {})
        if why:
            notes.append(f"crops of the picture assumed: {crops} ({why})")
    elif crops < 1:
        raise UserError(f"a picture is cut into 1 crop or more, not {crops}")
    elif family.crops is None and crops > 1:
        raise UserError(f"a {kind} model does not cut pictures into crops: leave out --crops")
    return Model(name, tower, connector, text, crops, tuple(notes))


def read_language(name: str, config: Mapping[str, Any]) -> Text:
    """The sizes of the language model alone, whatever family the `config` is of.

    Raises:
        UserError: a language model that is not known, or a config that transformers refuses.
    """
    whole = _transformers_config(name, config)
    return read_text(whole.get_text_config(), _tied(config, whole))


def _transformers_config(name: str, config: Mapping[str, Any]) -> Any:
    """transformers' config object, without its remarks about what was not asked."""
    transformers = require("transformers", "export", "the estimate")
    errors = require("huggingface_hub.errors", "export", "the estimate")
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        return transformers.AutoConfig.for_model(**config)
    except (errors.StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the config.json of {name} is not a valid {config['model_type']} config: {reason}") from error
    finally:
        quiet.setLevel(level)


def _crop(preprocessor: Mapping[str, Any]) -> Picture:
    """(width, height) of the pictures that a processor makes, where it says so."""
    size = preprocessor.get("crop_size") or preprocessor.get("size") or {}
    if isinstance(size, int):
        return size, size
    return (size["width"], size["height"]) if "width" in size and "height" in size else None


def _tied(config: Mapping[str, Any], whole: Any) -> bool:
    """Whether output projection and embedding are one: as config.json says at its top, else its text part."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        return bool(text["tie_word_embeddings"])
    return bool(whole.tie_word_embeddings)


def _tap(c: Any) -> int:
    """Layers up to the hidden state that `vision_feature_layer` names; hidden state 0 is before the first."""
    tap, layers = c.vision_feature_layer, c.vision_config.num_hidden_layers
    if not isinstance(tap, int):
        raise UserError(f"vision_feature_layer {tap!r} takes features of several layers: the estimate knows one")
    return int(layers + 1 + tap if tap < 0 else tap)


def _llava_taken(c: Any, tower: Tower) -> int:
    """ "default" drops the first token ([CLS]), "full" drops none."""
    return tower.sequence - (1 if c.vision_feature_select_strategy == "default" else 0)


def _llava(c: Any, tower: Tower, text: Text) -> Connector:
    bias = c.multimodal_projector_bias
    linears = (Linear(tower.dim, text.hidden, bias), Linear(text.hidden, text.hidden, bias))
    return Connector(1, linears, selects_first=True)


def _anyres_crops(c: Any, _: Mapping[str, Any]) -> tuple[int, str]:
    side = c.vision_config.image_size
    tiles = max((height // side) * (width // side) for height, width in c.image_grid_pinpoints)
    return 1 + tiles, "the most that image_grid_pinpoints allows, newline rows and padding left out"


def _idefics(c: Any, tower: Tower, text: Text) -> Connector:
    merge = c.scale_factor**2
    return Connector(merge, (Linear(tower.dim * merge, text.hidden, bias=False),), selects_first=False)


def _idefics_crops(c: Any, pre: Mapping[str, Any]) -> tuple[int, str]:
    if not pre.get("do_image_splitting") or "size" not in pre or "max_image_size" not in pre:
        return 1, "preprocessor_config.json does not ask for more" if pre else "there is no preprocessor_config.json"
    side = -(-pre["size"]["longest_edge"] // pre["max_image_size"]["longest_edge"])
    return side * side + 1, "the most that preprocessor_config.json allows"


def _internvl(c: Any, tower: Tower, text: Text) -> Connector:
    merge = round(1 / c.downsample_ratio) ** 2
    linears = (Linear(tower.dim * merge, text.hidden), Linear(text.hidden, text.hidden))
    return Connector(merge, linears, selects_first=False, norms=2 * tower.dim * merge)


def _internvl_crops(c: Any, pre: Mapping[str, Any]) -> tuple[int, str]:
    if not pre:
        return 1, "there is no preprocessor_config.json"
    most = pre.get("max_patches") or _INTERNVL_TILES  # crop_to_patches is not asked: the model's processor always crops
    return most + 1 if most > 1 else 1, "the most that preprocessor_config.json allows"


def _merger(c: Any, tower: Tower, text: Text) -> Connector:
    """Qwen's: a norm, the patches of a square joined, two products; DeepStack has one more for each of its levels."""
    v = c.vision_config
    merge = v.spatial_merge_size**2
    levels = len(getattr(v, "deepstack_visual_indexes", ()))
    linears = (Linear(tower.dim * merge, tower.dim * merge), Linear(tower.dim * merge, v.out_hidden_size))
    norms = tower.norm * tower.dim * (1 + levels * merge)
    return Connector(merge, linears, selects_first=False, copies=1 + levels, norms=norms)


def _paligemma(c: Any, tower: Tower, text: Text) -> Connector:
    return Connector(1, (Linear(tower.dim, c.projection_dim),), selects_first=True)


def _gemma3(c: Any, tower: Tower, text: Text) -> Connector:
    """Squares of patches are averaged before the choice; a norm and a product follow it."""
    merge, rest = divmod(tower.taken, c.mm_tokens_per_image)
    if rest:
        raise UserError(f"{tower.taken} patches do not make mm_tokens_per_image {c.mm_tokens_per_image} averages")
    return Connector(merge, (Linear(tower.dim, text.hidden, bias=False),), selects_first=True, norms=tower.dim)


_INTERNVL_TILES = 12  # default of its image processor

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _tap, _llava_taken),
    "llava_next": Family(_llava, _tap, _llava_taken, _anyres_crops),
    "idefics3": Family(_idefics, crops=_idefics_crops),
    "smolvlm": Family(_idefics, crops=_idefics_crops),
    "internvl": Family(_internvl, _tap, _llava_taken, _internvl_crops),
    "qwen2_5_vl": Family(_merger),
    "qwen3_vl": Family(_merger),
    "paligemma": Family(_paligemma, last_norm=True),
    "gemma3": Family(_gemma3, last_norm=True),
}
