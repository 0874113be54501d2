"""What the tests of families with tiles share: pictures and their tiling, other graphs in bundles, the true rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.families.base import Budget
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.vision import build_vision, save_graph
from svdprune.runtime.tiling import tiling_of
from tests.exporter import tiled_models

SIZES = [(640, 480), (60, 60), (200, 70), (33, 190), (500, 499), (41, 43), (300, 30)]  # width, height
SAVES: dict[str, Callable[..., Path]] = {"next": tiled_models.save_next, "onevision": tiled_models.save_onevision}
PROCESSORS: dict[str, Any] = {"next": LlavaNextImageProcessorPil, "onevision": LlavaOnevisionImageProcessorPil}


def replace_vision(folder: Path, bundle: Path, keep: int, budget: Budget, **options: Any) -> None:
    """Another vision graph in a bundle."""
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, "tiny")
    spec = dataclasses.replace(family.describe(checkpoint), budget=budget)
    keep = keep or spec.tokens
    precision, raw = options.pop("precision", "fp32"), options.pop("input", "uint8") == "uint8"
    config = SelectorConfig(**{"rank": 4, **options})
    save_graph(
        build_vision(checkpoint, family, spec, config, keep, precision=precision, raw=raw), bundle / "vision.onnx"
    )
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["vision"] |= {"keep": keep, "tokens": spec.tokens, "precision": precision}
    manifest["vision"]["input"] = "uint8" if raw else "float32"
    manifest["vision"]["tiles"]["budget"] = budget
    graph = (bundle / "vision.onnx").read_bytes()
    manifest["files"]["vision.onnx"] = {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1] // 7 + 2, size[0] // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def tiling(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    spec = family_of(checkpoint.config, "tiny").describe(checkpoint)
    assert spec.tiling is not None
    return tiling_of(spec.tiling), spec


@torch.no_grad()
def unpruned(model: Any, folder: Path, name: str, image: Image.Image) -> torch.Tensor:
    """The picture's rows (total, H), by transformers from the file on."""
    inputs = PROCESSORS[name].from_pretrained(folder)(image, return_tensors="pt")
    sizes = inputs["image_sizes"]
    rows: torch.Tensor = model.model.get_image_features(inputs["pixel_values"], sizes).pooler_output[0]
    return rows
