"""A checkpoint's processor files, old layout or new, as the runtime wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import ProcessorInfo

BICUBIC = 3  # Pillow's number
_RESCALE = 1 / 255


def image_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The picture's preprocessing, in the form of a bundle's `processor/image.json`.

    Read from `processor_config.json` (transformers 5) or `preprocessor_config.json` (before).

    Raises:
        UserError: neither file is there, or they lack the mean and deviation.
    """
    values = image_processor(checkpoint)
    areas = "merge_size" in values  # Qwen's: its sizes are limits of a picture's area, which its tiling has
    missing = [k for k in ("image_mean", "image_std", *([] if areas else ["size"])) if k not in values]
    if missing:
        raise UserError(
            f"the image processor of {checkpoint.folder} lacks {', '.join(missing)}: download the checkpoint again"
        )
    return {
        "resize": _size(values["size"]) if values.get("do_resize", True) and not areas else None,
        "resample": values.get("resample", BICUBIC),
        "crop": _square(values.get("crop_size", values.get("size"))) if values.get("do_center_crop", False) else None,
        "rescale": values.get("rescale_factor", _RESCALE) if values.get("do_rescale", True) else 1.0,
        "mean": values["image_mean"] if values.get("do_normalize", True) else [0.0, 0.0, 0.0],
        "std": values["image_std"] if values.get("do_normalize", True) else [1.0, 1.0, 1.0],
        "convert_rgb": values.get("do_convert_rgb") is not False,  # null in some: their processors do it by default
    }


def image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's own fields.

    Raises:
        UserError: neither file is there.
    """
    nested = (checkpoint.json("processor_config.json") or {}).get("image_processor")
    values: dict[str, Any] | None = nested or checkpoint.json("preprocessor_config.json")
    if not values:
        raise UserError(f"{checkpoint.folder} has no preprocessor_config.json: the picture's preprocessing is unknown")
    return values


def _size(size: Any) -> dict[str, int] | None:
    """A resize target; early releases wrote a bare number for the shortest edge. None for a longest edge: of tiles."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {k: size[k] for k in ("shortest_edge", "height", "width") if k in size} or None


def _square(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    edge = size.get("shortest_edge")
    return {"height": size.get("height", edge), "width": size.get("width", edge)}


def image_token(checkpoint: Checkpoint) -> int:
    """The id that stands for the picture in a prompt."""
    config = checkpoint.config
    found = config.get("image_token_id", config.get("image_token_index"))
    if not isinstance(found, int):
        raise UserError(
            f"{checkpoint.folder}/config.json has no image_token_index: it does not say where a picture goes"
        )
    return found


def special_token(checkpoint: Checkpoint, name: str) -> str | None:
    """The text of one of the tokenizer's own special tokens, such as `start_image_token`; None where it names none."""
    settings = checkpoint.json("tokenizer_config.json") or {}
    own = settings.get("extra_special_tokens")  # a list in some releases, without names
    found = settings.get(name) or (own.get(name) if isinstance(own, dict) else None)
    return _text_of(found)


def write_processor(
    checkpoint: Checkpoint,
    folder: Path,
    tiling: dict[str, Any] | None = None,
    picture: tuple[str, str] | None = None,
    template: str | None = None,
) -> ProcessorInfo:
    """Write `tokenizer.json`, `chat_template.jinja` and `image.json` into `folder` (named "processor").

    `tiling` is the family's, for image.json; `picture` its `picture_text`; `template` its `chat_template`, beside which
    the tokenizer adds nothing.

    Raises:
        UserError: the checkpoint has no fast tokenizer or no chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = read_tokenizer(checkpoint)
    if template is not None:
        tokenizer.post_processor = None
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template or _chat_template(checkpoint), encoding="utf-8")
    image = {**image_values(checkpoint), **({"tiling": tiling} if tiling is not None else {})}
    (folder / "image.json").write_text(json.dumps(image, indent=2) + "\n", encoding="utf-8")
    token_id = image_token(checkpoint)
    token = tokenizer.id_to_token(token_id)
    if token is None:
        raise UserError(
            f"the tokenizer of {checkpoint.folder} has no token {token_id}, which config.json gives to pictures"
        )
    settings = checkpoint.json("tokenizer_config.json") or {}
    return ProcessorInfo(
        tokenizer="processor/tokenizer.json",
        chat_template="processor/chat_template.jinja",
        image="processor/image.json",
        image_token_id=token_id,
        image_token=token,
        bos_token=_text_of(settings.get("bos_token")),
        eos_token=_text_of(settings.get("eos_token")),
        placeholder=None if picture is None else picture[0],
        picture=None if picture is None else picture[1],
    )


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's fast tokenizer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = checkpoint.folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{checkpoint.folder} has no tokenizer.json: load it with transformers' AutoTokenizer and "
            "save_pretrained() it, which writes one"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise UserError(f"{file} is not a tokenizer ({error}): download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _chat_template(checkpoint: Checkpoint) -> str:
    file = checkpoint.folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (checkpoint.json(name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    raise UserError(
        f"{checkpoint.folder} has no chat template (chat_template.jinja or .json): the prompt's form is unknown"
    )


def _text_of(token: Any) -> str | None:
    """A special token is a string, or an object that holds it as `content`."""
    return token.get("content") if isinstance(token, dict) else token
