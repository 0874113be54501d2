"""The tiny bundle with a golden case computed by its NumPy references, whole or spoilt on purpose."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from svdprune.runtime import load
from svdprune.runtime.bundle import open_bundle, write_bundle

QUESTION = "What is bright?"
LENGTH = 5


def reference(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The golden case and arrays of the bundle ``source``, by ``tiny``'s NumPy references."""
    vlm = load(source, threads=1)
    with Image.open(source / "golden/image.png") as picture:
        pixels = vlm.see(picture).pixels
    features, kept, scores = tiny.reference_vision(pixels)
    prompt = vlm.prompt_ids(QUESTION)
    place = prompt.index(vlm.manifest.processor.image_token_id)
    embed = tiny.weights()["embed"]
    rows = np.concatenate([embed[prompt[:place]], features, embed[prompt[place + 1 :]]])
    answer: list[int] = []
    first = None
    while len(answer) < LENGTH:
        logits = tiny.reference_logits(rows, np.arange(len(rows)))
        first = logits if first is None else first
        answer.append(int(logits.argmax()))
        if answer[-1] in vlm.manifest.decoder.eos:
            answer.pop()
            break
        rows = np.concatenate([rows, embed[answer[-1:]]])
    case = {
        "question": QUESTION,
        "prompt_ids": prompt,
        "kept_indices": kept.tolist(),
        "answer": vlm.text.decode(answer),
        "answer_ids": answer,
        "positions": "compact",
        "dtype": "float32",
    }
    arrays = {"features": features, "scores": scores, "logits": first}
    return case, {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def golden_bundle(source: Path, path: Path, vision: str = "fp32", decoder: str = "fp32", **spoilt: Any) -> Path:
    """A copy of the bundle ``source`` with a golden case.

    Args:
        vision, decoder: the precisions that the manifest claims.
        spoilt: fields of the case, or arrays, put in place of the right ones; None leaves one out.
    """
    case, arrays = reference(source)
    for name, value in spoilt.items():
        place: dict[str, Any] = arrays if name in arrays else case
        if value is None:
            del place[name]
        else:
            place[name] = value
    opened = open_bundle(source)
    with write_bundle(path) as writer:
        for name in opened.manifest.files:
            shutil.copy(source / name, writer.file(name))
        writer.file("golden/case.json").write_text(json.dumps(case), encoding="utf-8")
        np.savez(writer.file("golden/arrays.npz"), **arrays)
        manifest = opened.manifest
        writer.manifest = dataclasses.replace(
            manifest,
            vision=dataclasses.replace(manifest.vision, precision=vision),
            decoder=dataclasses.replace(manifest.decoder, precision=decoder),
        )
    return path
