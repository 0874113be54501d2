"""From what a user types (an alias, a hub id, a folder) to a checkpoint folder."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require

SHIPPED = "mini-llava"
ALIASES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "paligemma": "google/paligemma-3b-mix-224",
    "paligemma2": "google/paligemma2-3b-mix-224",
    "gemma3": "google/gemma-3-4b-it",
}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# What an export reads, the licence too: no other framework's weights, no pictures.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICEN[CS]E*"]


@dataclass(frozen=True)
class Source:
    """A checkpoint and where it came from. `revision` is the hub's commit, None for a folder."""

    id: str
    checkpoint: Checkpoint
    revision: str | None


def shipped_folder() -> Path:
    """The checkpoint inside the package, from a clone or an installed wheel."""
    return Path(str(resources.files("svdprune.exporter"))) / "models" / SHIPPED


def locate(model: str, revision: str | None = None) -> Source:
    """Find `model`: the shipped one, an alias, a folder, or a hub id (fetched into the hub's cache).

    Raises:
        UserError: nothing of that name, the hub cannot be reached, or the folder is no checkpoint.
    """
    place = place_of(model)
    if isinstance(place, str):
        folder = fetch(place, revision, _FILES)
        return Source(place, Checkpoint(folder), folder.name)
    return Source(model if model == SHIPPED else place.resolve().name, Checkpoint(place), None)


def place_of(model: str) -> Path | str:
    """Where `model` is: a folder (whether or not it is there), or the id of a model on the hub.

    Raises:
        UserError: nothing of that name; near misses are named.
    """
    if model == SHIPPED:
        return shipped_folder()
    if model in ALIASES:
        return ALIASES[model]
    folder = Path(model).expanduser()
    if folder.exists() or model.startswith((".", "/", "~")):
        return folder
    if _HUB_ID.match(model):
        return model
    names = [SHIPPED, *ALIASES]
    near = difflib.get_close_matches(model, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join(names)}."
    raise UserError(f"there is no model {model!r}: {hint} A folder or a hub id (owner/name) works too")


def fetch(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache with those files of a model that `patterns` name.

    Raises:
        UserError: no such model or revision, a licence not accepted, or the hub cannot be reached.
    """
    hub = require("huggingface_hub", "export")
    errors = require("huggingface_hub.errors", "export")
    try:
        return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise UserError(f"{hub_id} wants its licence accepted: accept it on the hub, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{hub_id} has no revision {revision!r}: leave --revision out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id} (or it is private): check the name, or `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the hub cannot be reached for {hub_id} and it is not in the local cache: "
            "download it elsewhere and give its folder"
        ) from error
