"""A checkpoint folder that transformers 5 wrote, as transformers 4.57 reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

TOWERS = ("clip_vision_model", "siglip_vision_model")  # whose weights had a wrapper of their own


def older_layout(folder: Path, out: Path) -> Path:
    """Write `out`: weights under their names of before, rotary settings and the processor where they were before."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if (config.get("vision_config") or {}).get("model_type") in TOWERS:
        weights = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): w for name, w in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for part in (config, config.get("text_config")):
        if part and "rope_parameters" in part:
            part |= _rotary(part.pop("rope_parameters"))
    (out / "config.json").write_text(json.dumps(config))
    (out / "preprocessor_config.json").write_text(json.dumps(_image(folder)))
    return out


def _rotary(settings: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and Gemma 3's `rope_local_base_freq` from `rope_parameters`."""
    if "full_attention" in settings:
        local = settings["sliding_attention"]["rope_theta"]
        return {**_rotary(settings["full_attention"]), "rope_local_base_freq": local}
    rest = {name: value for name, value in settings.items() if name != "rope_theta"}
    plain = rest == {"rope_type": "default"}
    return {"rope_theta": settings["rope_theta"], "rope_scaling": None if plain else rest}


def _image(folder: Path) -> dict[str, Any]:
    """The image processor in its own file; the least and largest area of Qwen's pictures under their older names."""
    whole = folder / "processor_config.json"
    image: dict[str, Any] | None = json.loads(whole.read_text()).get("image_processor") if whole.is_file() else None
    image = image or json.loads((folder / "preprocessor_config.json").read_text())
    size = image.get("size", {})
    if "merge_size" in image and {"shortest_edge", "longest_edge"} <= set(size):
        image |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return image
