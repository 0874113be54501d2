"""Tiny models of every family, their bundles, and what the runtime answers with them."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.source import shipped_folder
from svdprune.runtime import load
from svdprune.runtime.positions import POLICIES
from svdprune.runtime.tiling.feed import prepare
from svdprune.runtime.vlm import Vlm

QUESTIONS = ("What is in the picture?", "What color is the circle left of the square?")
PICTURES = ((96, 96), (150, 70), (60, 130))  # width, height
LIMIT = 12


@dataclass(frozen=True)
class Model:
    """One row of the table.

    save: who makes the checkpoint (`module:function`), None for the shipped one. keep: K. language: its text model.
    nested: whether the image processor takes lists of a prompt's pictures. images: what the whole processor tells it.
    """

    save: str | None
    keep: int
    language: str
    nested: bool = False
    images: dict[str, Any] = field(default_factory=dict)


_TILED, _SHUFFLED = "tests.exporter.tiled_models", "tests.exporter.shuffled_models"
_QWEN, _GEMMA = "tests.exporter.qwen_models", "tests.exporter.gemma_models"
MODELS = {
    "llava": Model(None, 32, "Llama"),
    "llava_next": Model(f"{_TILED}:save_next", 12, "Mistral"),
    "llava_onevision": Model(f"{_TILED}:save_onevision", 12, "Qwen2"),
    "smolvlm": Model(f"{_SHUFFLED}:save_smolvlm", 12, "Llama", nested=True),
    "idefics3": Model(f"{_SHUFFLED}:save_idefics3", 12, "Llama", nested=True),
    "internvl": Model(f"{_SHUFFLED}:save_internvl", 12, "Qwen2", images={"crop_to_patches": True}),
    "qwen2_5_vl": Model(f"{_QWEN}:save_qwen2_5", 12, "Qwen2.5"),
    "qwen3_vl": Model(f"{_QWEN}:save_qwen3", 12, "Qwen3"),
    "paligemma": Model(f"{_GEMMA}:save_paligemma", 9, "Gemma"),
    "paligemma (2)": Model(f"{_GEMMA}:save_paligemma2", 9, "Gemma 2"),
    "gemma3": Model(f"{_GEMMA}:save_gemma3", 7, "Gemma 3"),
}


@dataclass
class Case:
    """One question under one policy: what the reference needs to answer it, and what the bundle said.

    ids: of the unpruned prompt, a picture token for each row of the picture that is no text. kept: the rows of it that
    the bundle's prompt has. By the bundle: rows float32 (r, H), those of the picture that are no text; logits float32
    (V,) of the first token.
    """

    whole: bool
    positions: str
    picture: str
    ids: list[int]
    kept: list[int]
    tokens: list[int]
    rows: np.ndarray
    logits: np.ndarray

    def asked(self, vlm: Vlm, model: Model) -> dict[str, Any]:
        """What `reference.py` reads."""
        manifest = vlm.manifest
        return {
            "picture": self.picture,
            "ids": self.ids,
            "kept": self.kept,
            "positions": self.positions,
            "image_token": manifest.processor.image_token_id,
            "mask": manifest.decoder.mask,
            "eos": manifest.decoder.eos,
            "limit": LIMIT,
            "nested": model.nested,
            "images": model.images,
        }


def checkpoint_of(model: Model, folder: Path) -> Path:
    """A folder with the model's checkpoint."""
    if model.save is None:
        shutil.copytree(shipped_folder(), folder)
        return folder
    module, function = model.save.split(":")
    save: Callable[[Path], Path] = getattr(importlib.import_module(module), function)
    folder.mkdir(parents=True)
    return save(folder)


def exported(checkpoint: Path, out: Path, keep: int | None) -> Path:
    """A bundle that keeps `keep` tokens, all of them where it is None."""
    select = "none" if keep is None else "leverage"
    rank = None if keep is None else 4
    export_model(ExportRequest(str(checkpoint), str(keep or 1), select=select, rank=rank, out=out, report=False))
    return out


def pictures(work: Path) -> list[str]:
    """Files of noise of a few colours, written into `work`."""
    names = []
    for width, height in PICTURES:
        noise = np.random.default_rng(width).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
        names.append(f"{width}x{height}.png")
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(work / names[-1])
    return names


def ask_all(vlm: Vlm, work: Path, whole: bool) -> list[Case]:
    """Every question about every picture, under every policy that the bundle can have."""
    cases = []
    for name in pictures(work):
        sight = vlm.see(work / name)
        rows = unpruned_ids(vlm, work / name, sight.total)
        for question in QUESTIONS:
            ids = vlm.prompt_ids(question)
            place = ids.index(vlm.manifest.processor.image_token_id)
            full = [*ids[:place], *rows, *ids[place + 1 :]]
            after = range(place + sight.total, len(full))
            kept = [*range(place), *(place + sight.places).tolist(), *after]
            no_text = np.array([rows[row] for row in sight.places]) == vlm.manifest.processor.image_token_id
            for policy in POLICIES:
                vlm.positions = policy
                tokens = vlm.ask(sight, question, max_new_tokens=LIMIT, temperature=0.0).token_ids
                logits = vlm.first_logits(sight, question)
                cases.append(Case(whole, policy, name, full, kept, tokens, sight.features[no_text], logits))
    return cases


def unpruned_ids(vlm: Vlm, picture: Path, total: int) -> list[int]:
    """What the unpruned prompt has in the picture's place: its token, and the tokens of text between its tiles."""
    ids = [vlm.manifest.processor.image_token_id] * total
    cut = prepare(picture, vlm.settings, vlm.manifest).cut
    for row, code, _ in [] if cut is None else cut.marks.tolist():
        if code >= 0:
            ids[row] = code
    return ids


def opened(bundle: Path) -> Vlm:
    """The bundle, ready to answer."""
    return load(bundle, threads=1)
