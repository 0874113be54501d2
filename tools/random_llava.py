"""LLaVA checkpoints of true shapes with random weights, to measure speed and memory on: neither depends on the values.

    python -m tools.random_llava 0.5b build/llava-0.5b

CLIP ViT-L/14-336 with a language model of Qwen2-0.5B's or Qwen2-1.5B's shapes, in float16. Tokenizer, template and
processor are mini-llava's; ids beyond its vocabulary have no text. One drawn block of numbers fills all weights, from
another place in each: programs that store equal weights once would have an easier time than with a trained model.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import click
import numpy as np

from tools.memory import VISION

# Published configurations; what is left out has transformers' defaults.
_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXTS: dict[str, dict[str, Any]] = {
    "0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
_BLOCK = 1 << 22  # numbers drawn


def make(shape: str, folder: Path) -> None:
    """Write the checkpoint of a shape into ``folder``, which is made."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from svdprune.exporter.source import shipped_folder

    folder.mkdir(parents=True, exist_ok=True)
    shipped = shipped_folder()
    own = json.loads((shipped / "config.json").read_text())
    given = {**own, "text_config": TEXTS[shape], "vision_config": {**own["vision_config"], **VISION}}
    config = LlavaConfig(**{name: value for name, value in given.items() if name != "transformers_version"})
    config.dtype = "float16"
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlavaForConditionalGeneration(config).named_parameters()}
    config.save_pretrained(folder)
    for file in shipped.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "training.json"):
            shutil.copy(file, folder / file.name)
    _write(folder / "model.safetensors", shapes)


def _write(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(shapes.items()):
            count, scale = int(np.prod(shape)), shape[-1] ** -0.5 if len(shape) > 1 else 0.02
            centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0  # of norms
            block = np.roll((centre + scale * drawn).astype(np.float16), 7919 * number)
            for start in range(0, count, _BLOCK):
                out.write(block[: min(_BLOCK, count - start)].tobytes())


@click.command(help=__doc__)
@click.argument("shape", type=click.Choice(tuple(TEXTS)))
@click.argument("folder", type=click.Path(path_type=Path))
def main(shape: str, folder: Path) -> None:
    make(shape, folder)


if __name__ == "__main__":
    main()
