"""The model families that can be exported, and what of each was checked: one row a family, for all who list them.

``svdprune models`` prints them, ``tools/models_table.py`` puts them into the README; a test holds them to the families
and short names that the exporter has.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

NEWEST, OLDER = "5.23.0", "4.57.1"
"""The releases of transformers that answers were compared with (``docs/families.md``)."""


@dataclass(frozen=True)
class ModelFamily:
    """What is known of a family.

    Attributes:
        family: its name in manifests.
        model_types: values of ``model_type`` in config.json.
        title: for a person.
        names: short names that ``svdprune export`` takes beside hub ids and folders.
        parts: vision tower, what joins or leads to tokens, language models.
        weights: ``trained`` where a trained checkpoint was exported and answered, ``random`` where small random ones
            were.
        parity: releases of transformers whose greedy tokens the bundle has, all tokens kept and K kept, both policies.
        differs: why a release is not among them, None where none is missing.
        gate: the shapes at which TensorRT-RTX built the vision graph on a CPU.
        gpu: what ran on a GPU, None for nothing.
    """

    family: str
    model_types: tuple[str, ...]
    title: str
    names: tuple[str, ...]
    parts: str
    weights: str
    gate: str
    parity: tuple[str, ...] = (NEWEST, OLDER)
    differs: str | None = None
    gpu: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)


FAMILIES = (
    ModelFamily(
        "llava",
        ("llava",),
        "LLaVA-1.5",
        ("mini-llava", "llava", "llava-7b", "llava-13b"),
        "CLIP, SigLIP or DINOv2; Llama, Mistral, Qwen2, Qwen3",
        "trained",
        "ViT-L/14 at 336, 24 layers",
    ),
    ModelFamily(
        "llava_next",
        ("llava_next",),
        "LLaVA-NeXT (1.6)",
        ("llava-next",),
        "CLIP in tiles, newlines; Llama, Mistral, Qwen2",
        "random",
        "ViT-L/14 at 336, 5 tiles",
    ),
    ModelFamily(
        "llava_onevision",
        ("llava_onevision",),
        "LLaVA-OneVision",
        ("llava-onevision",),
        "SigLIP in tiles, resampled grid, newlines; Qwen2",
        "random",
        "SigLIP-so400m at 384, 8,667 candidates",
        (NEWEST,),
        f"{OLDER} takes the tower's last hidden state after its last norm, {NEWEST} before it",
    ),
    ModelFamily(
        "idefics3",
        ("idefics3", "smolvlm"),
        "SmolVLM, Idefics3",
        ("smolvlm", "smolvlm-256m", "idefics3"),
        "SigLIP in tiles, pixel shuffle; Llama",
        "random",
        "SigLIP-so400m at 384, 17 tiles",
        (NEWEST,),
        f"{OLDER} gives each patch but the first of its line the place before its own, by a rounding",
    ),
    ModelFamily(
        "internvl",
        ("internvl",),
        "InternVL 2.5, 3 (`-hf`)",
        ("internvl",),
        "InternViT in tiles, pixel shuffle; Qwen2, Qwen3, Llama",
        "random",
        "InternViT-300M at 448, 13 tiles",
    ),
    ModelFamily(
        "qwen2_5_vl",
        ("qwen2_5_vl",),
        "Qwen2.5-VL",
        ("qwen2.5-vl",),
        "windows, any size, merger; M-RoPE",
        "random",
        "the 7B's, up to 1,280 tokens",
    ),
    ModelFamily(
        "qwen3_vl",
        ("qwen3_vl",),
        "Qwen3-VL",
        ("qwen3-vl",),
        "any size, merger; M-RoPE, DeepStack",
        "random",
        "the 8B's, up to 1,280 tokens",
    ),
    ModelFamily(
        "paligemma",
        ("paligemma",),
        "PaliGemma 1, 2",
        ("paligemma", "paligemma2"),
        "SigLIP; Gemma, Gemma 2 with a prefix that sees itself",
        "random",
        "SigLIP-so400m at 224",
    ),
    ModelFamily(
        "gemma3",
        ("gemma3",),
        "Gemma 3",
        ("gemma3",),
        "SigLIP, averages of patches; Gemma 3 whose pictures see themselves",
        "random",
        "SigLIP-so400m at 896",
    ),
)
