"""A checkpoint folder in Hugging Face layout, read tensor by tensor: the model is never built.

Exporting one part of a 7B model must not need the memory of all of it, so a tensor is read when it is asked for and
nothing is kept. Every header is checked when the folder is opened, so a download that stopped half-way is found before
minutes of work, not after. Names are given in one layout whatever the checkpoint's age: see `canonical_name`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from svdprune.runtime.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The wrappers that the layouts put around the same parts, oldest first:
#   language_model.model.layers.0...   language_model.lm_head.weight   vision_tower.vision_model.encoder...   (hub)
#   language_model.layers.0...         lm_head.weight                  vision_tower.encoder...
#   model.language_model.layers.0...   lm_head.weight                  model.vision_tower.encoder...  (transformers 5)
#   model.text_model.layers.0...       lm_head.weight                  model.vision_model.encoder...  (Idefics3)
_RULES = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^model\.text_model\."), "model.language_model."),
    (re.compile(r"^model\.vision_model\."), "model.vision_tower."),
    (re.compile(r"^(?:model\.)?image_newline$"), "model.image_newline"),
    (re.compile(r"^(?:model\.)?visual\."), "model.visual."),
    (re.compile(r"^model\.(layers|embed_tokens|norm)\."), r"model.language_model.\1."),
)


def canonical_name(name: str) -> str:
    """The name that transformers 5 gives in memory to the tensor called `name` in a LLaVA checkpoint of any age; the
    parts of other families have the names of LLaVA's where they do the same.

    `model.vision_tower.*`, `model.multi_modal_projector.*`, `model.language_model.*` and `lm_head.*`; a name of no
    known layout is returned unchanged. Idempotent.
    """
    for pattern, replacement in _RULES:
        renamed, count = pattern.subn(replacement, name, count=1)
        if count:
            return renamed
    return name


def with_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose language model has an entry of its own: Qwen2.5-VL's on the hub has its fields side by side with
    those of the whole. They stay there, too."""
    if "vision_config" not in config or "text_config" in config or "hidden_size" not in config:
        return config
    own = {name: value for name, value in config.items() if name not in ("vision_config", "architectures")}
    return {**config, "text_config": {**own, "model_type": f"{config.get('model_type')}_text"}}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `stored` is its name in the file; `dtype` is spelled as in safetensors: "F16", "BF16"..."""

    file: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A folder with `config.json` and safetensors, one file or shards with an index.

    Attributes:
        folder: the folder.
        config: `config.json`, parsed, with `text_config` always an entry of its own.

    Raises:
        UserError: the folder, its `config.json` or its weights are missing, not readable or incomplete; the sentence
            names the file and says what to do.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"no folder at {self.folder}: give a folder in Hugging Face layout (config.json, safetensors)"
            )
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.folder} has no config.json: it is not a checkpoint in Hugging Face layout")
        self.config: dict[str, Any] = with_text_config(_read_json(self.folder / "config.json"))
        self._files = self._weight_files()
        self._tensors: dict[str, TensorInfo] = {}
        for file in self._files:
            for info in read_header(file):
                name = canonical_name(info.stored)
                if name in self._tensors:
                    other = self._tensors[name]
                    raise UserError(
                        f"{self.folder} holds {name} twice ({other.stored} in {other.file.name}, {info.stored} in "
                        f"{file.name}): remove the weight files that do not belong to this model"
                    )
                self._tensors[name] = info

    def names(self) -> list[str]:
        """Canonical names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this canonical name."""
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor, without reading it.

        Raises:
            UserError: there is none of this canonical name.
        """
        if name not in self._tensors:
            raise UserError(
                f"{self.folder} has no tensor {name}: the weights do not fit its config.json, download it again"
            )
        return self._tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype of the file, by its canonical name.

        The file is mapped for as long as the tensor lives and no longer, so that memory follows what is in use.

        Raises:
            UserError: no such tensor, or the file changed since it was opened.
        """
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as shard:
                return shard.get_tensor(info.stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{info.file} cannot be read ({error}): download the checkpoint again") from error

    def tensors(self, prefixes: str | Iterable[str]) -> dict[str, torch.Tensor]:
        """Read all tensors whose canonical name starts with one of `prefixes`. No other tensor is touched.

        Raises:
            UserError: a prefix that no tensor has.
        """
        found: dict[str, torch.Tensor] = {}
        for prefix in [prefixes] if isinstance(prefixes, str) else prefixes:
            matching = [name for name in self.names() if name.startswith(prefix)]
            if not matching:
                raise UserError(f"{self.folder} has no tensors named {prefix}*: the weights do not fit its config.json")
            found.update((name, self.tensor(name)) for name in matching)
        return found

    def json(self, name: str) -> dict[str, Any] | None:
        """Another JSON file of the folder (`generation_config.json`), or None when it is not there.

        Raises:
            UserError: it is there but is not a JSON object.
        """
        file = self.folder / name
        return _read_json(file) if file.is_file() else None

    def fingerprint(self) -> str:
        """SHA-256 (hex) over name, size and full content of `config.json` and of every weight file.

        The content is hashed, not only the headers, because two fine-tunes of a model differ in nothing else. Reads
        all of the checkpoint, in pieces.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in [self.folder / "config.json", *self._files]:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while piece := content.read(1 << 22):
                    digest.update(piece)
        return digest.hexdigest()

    def _weight_files(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            shards = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{self.folder / INDEX} names no weights: download the checkpoint again")
            files = [self.folder / name for name in sorted({str(name) for name in shards.values()})]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(
                    f"{self.folder} lacks {len(missing)} of {len(files)} weight files ({', '.join(missing)}): "
                    "download the checkpoint again"
                )
            return files
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth")):
            raise UserError(
                f"{self.folder} has weights as .bin or .pth only: load it with transformers and save_pretrained() it, "
                "which writes safetensors"
            )
        raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}: download the checkpoint again")


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file, from its header, after checking that the file is as long as it says.

    Raises:
        UserError: not a safetensors file, or shorter (or longer) than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if start.startswith(b"version "):
            raise UserError(f"{file} is a Git LFS pointer, not weights: run `git lfs pull` in {file.parent}")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes): download it again")
        try:
            header = json.loads(content.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            infos = [TensorInfo(file, name, v["dtype"], tuple(v["shape"])) for name, v in tensors.items()]
            end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{file} is not a safetensors file (its header cannot be read): download it again"
            ) from error
    expected = 8 + length + end
    if size < expected:
        raise UserError(f"{file} is truncated: {size} of {expected} bytes are there, download it again")
    if size > expected:
        raise UserError(f"{file} has {size} bytes where its header says {expected}: download it again")
    return infos


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: download it again")
    return content
