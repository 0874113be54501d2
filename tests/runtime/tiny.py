"""A bundle small enough for a test: hand-made graphs whose every number the tests can compute on their own.

The vision graph takes 28 x 28 pixels as 4 x 4 patches and keeps the brightest; the decoder is a two-layer Llama without
norms and with one ReLU product as its MLP, and ``reference_logits`` is the same in NumPy, without a cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from svdprune.runtime.bundle import write_bundle
from svdprune.runtime.manifest import (
    DecoderInfo,
    GoldenInfo,
    Manifest,
    ModelInfo,
    ProcessorInfo,
    SelectorInfo,
    VisionInfo,
)

SIDE, PATCH, KEEP = 28, 7, 4
ROWS = SIDE // PATCH
TOKENS = ROWS * ROWS
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, CONTEXT = 32, 2, 4, 2, 8, 48, 400
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% else %}ASSISTANT: {% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ image_token }}\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
IMAGE = {
    "resize": {"shortest_edge": SIDE},
    "resample": 3,
    "crop": {"height": SIDE, "width": SIDE},
    "rescale": 1 / 255,
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "convert_rgb": True,
}


def tokenizer() -> Tokenizer:
    """One token a byte, as in byte-level BPE, after four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


VOCAB = tokenizer().get_vocab_size()


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, float32, large enough that every row matters to the logits."""
    random = np.random.default_rng(seed)
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"embed": (VOCAB, HIDDEN), "head": (HIDDEN, VOCAB), "projector": (3, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"q{i}": (HIDDEN, wide),
            f"k{i}": (HIDDEN, narrow),
            f"v{i}": (HIDDEN, narrow),
            f"o{i}": (wide, HIDDEN),
        }
        shapes |= {f"up{i}": (HIDDEN, INNER), f"down{i}": (INNER, HIDDEN)}
    return {name: (random.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


def rotary() -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [context, head_dim / 2]."""
    angles = np.outer(np.arange(CONTEXT), 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def vision_graph(path: Path, poison: str | None = None, keep: int = KEEP, dtype: str = "uint8") -> None:
    """Patch means as scores, the brightest kept. On black, ``poison`` makes "scores" or "features" NaN."""
    values = weights()
    spoilt = {"scores": "ones_or_nan", "features": "one_row"}.get(poison or "", "")
    floats = ["pixels"] if dtype == "float32" else ["raw"]
    nodes = [] if dtype == "float32" else [helper.make_node("Cast", ["pixels"], ["raw"], to=TensorProto.FLOAT)]
    if dtype == "float32":
        nodes += [helper.make_node("Transpose", floats, ["image"], perm=[0, 2, 3, 1])]
    else:
        nodes += [helper.make_node("Mul", ["raw", "rescale"], ["image"])]
    nodes += [
        helper.make_node("Reshape", ["image", "cells"], ["split"]),  # [B, rows, patch, rows, patch, 3]
        helper.make_node("ReduceMean", ["split", "inside"], ["means"], keepdims=0),  # [B, rows, rows, 3]
        helper.make_node("Reshape", ["means", "flat"], ["tokens"]),  # [B, T, 3]
        helper.make_node("ReduceSum", ["tokens", "last"], ["bright"], keepdims=0),  # [B, T]
        helper.make_node("Div", ["bright", "bright"], ["ones_or_nan"]),
        helper.make_node("Mul", ["bright", spoilt if poison == "scores" else "unit"], ["scores"]),
        helper.make_node("TopK", ["scores", "keep"], ["values", "best"], axis=1, largest=1, sorted=1),
        helper.make_node("Cast", ["best"], ["best_float"], to=TensorProto.FLOAT),
        helper.make_node("TopK", ["best_float", "keep"], ["ordered", "order"], axis=1, largest=0, sorted=1),
        helper.make_node("Cast", ["ordered"], ["kept_indices"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["kept_indices", "last"], ["index"]),
        helper.make_node("Expand", ["index", "three"], ["wide_index"]),
        helper.make_node("GatherElements", ["tokens", "wide_index"], ["chosen"], axis=1),
        helper.make_node("MatMul", ["chosen", "projector"], ["clean"]),
        helper.make_node("Div", ["chosen", "chosen"], ["one_each"]),
        helper.make_node("ReduceMean", ["one_each", "last"], ["one_row"], keepdims=1),
        helper.make_node("Mul", ["clean", spoilt if poison == "features" else "unit"], ["features"]),
    ]  # fmt: skip
    constants = {
        "rescale": np.array(1 / 255, np.float32),
        "cells": np.array([-1, ROWS, PATCH, ROWS, PATCH, 3], np.int64),
        "inside": np.array([2, 4], np.int64),
        "flat": np.array([0, TOKENS, 3], np.int64),
        "last": np.array([-1], np.int64),
        "keep": np.array([keep], np.int64),
        "three": np.array([1, 1, 3], np.int64),
        "unit": np.array(1, np.float32),
        "projector": values["projector"],
    }
    kind, shape = (
        (TensorProto.UINT8, ["B", SIDE, SIDE, 3]) if dtype == "uint8" else (TensorProto.FLOAT, ["B", 3, SIDE, SIDE])
    )
    graph = helper.make_graph(
        nodes,
        "vision",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", keep, HIDDEN]),
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, ["B", keep]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", TOKENS]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    _save(graph, path, {"": 18})


def reference_vision(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [K, H], kept indices [K], scores [T] of uint8 [SIDE, SIDE, 3]."""
    split = (pixels.astype(np.float64) / 255).reshape(ROWS, PATCH, ROWS, PATCH, 3)
    tokens = split.mean(axis=(1, 3)).reshape(TOKENS, 3)
    scores = tokens.sum(axis=1)
    kept = np.sort(np.argsort(-scores, kind="stable")[:KEEP])
    return tokens[kept] @ weights()["projector"], kept, scores


def decoder_graph(path: Path, nan: bool = False) -> None:
    """The decoder; its cache may be growing or shared. ``nan`` makes every logit NaN."""
    values = weights()
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["count"], keepdims=0),
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["last32"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total"]),
        helper.make_node("Cast", ["total"], ["total32"], to=TensorProto.INT32),
    ]
    x = "inputs_embeds"
    for i in range(LAYERS):
        nodes += [helper.make_node("MatMul", [x, f"{part}{i}"], [f"{part}_{i}"]) for part in "qkv"]
        nodes += [
            helper.make_node(
                "RotaryEmbedding", [f"{part}_{i}", "position_ids", "cos", "sin"], [f"{part}r_{i}"],
                domain="com.microsoft", num_heads=heads, rotary_embedding_dim=0,
            )
            for part, heads in (("q", HEADS), ("k", KV_HEADS))
        ]  # fmt: skip
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        nodes += [
            helper.make_node(
                "GroupQueryAttention",
                [f"qr_{i}", f"kr_{i}", f"v_{i}", *past, "last32", "total32"],
                [f"mixed_{i}", f"present.{i}.key", f"present.{i}.value"],
                domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=0,
            ),
            helper.make_node("MatMul", [f"mixed_{i}", f"o{i}"], [f"out_{i}"]),
            helper.make_node("Add", [x, f"out_{i}"], [f"after_{i}"]),
            helper.make_node("MatMul", [f"after_{i}", f"up{i}"], [f"up_{i}"]),
            helper.make_node("Relu", [f"up_{i}"], [f"relu_{i}"]),
            helper.make_node("MatMul", [f"relu_{i}", f"down{i}"], [f"down_{i}"]),
            helper.make_node("Add", [f"after_{i}", f"down_{i}"], [f"x_{i}"]),
        ]  # fmt: skip
        x = f"x_{i}"
    nodes += [helper.make_node("MatMul", [x, "head"], ["clean"])]
    nodes += [helper.make_node("Mul" if nan else "Add", ["clean", "nan" if nan else "zero"], ["logits"])]
    cos, sin = rotary()
    constants = values | {
        "axis": np.array([1], np.int64),
        "one": np.array(1, np.int64),
        "cos": cos,
        "sin": sin,
        "zero": np.array(0, np.float32),
        "nan": np.array(np.nan, np.float32),
    }
    used = {name for node in nodes for name in node.input}
    cache = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            helper.make_tensor_value_info("inputs_embeds", floats, ["B", "N", HIDDEN]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "total"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["B", "N"]),
            *(
                helper.make_tensor_value_info(f"past_key_values.{n}", floats, ["B", KV_HEADS, "P", HEAD_DIM])
                for n in cache
            ),
        ],
        [
            helper.make_tensor_value_info("logits", floats, ["B", "N", VOCAB]),
            *(
                helper.make_tensor_value_info(f"present.{n}", floats, ["B", KV_HEADS, "present", HEAD_DIM])
                for n in cache
            ),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    _save(graph, path, {"": 18, "com.microsoft": 1})


def reference_logits(embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The decoder in float64: rows [n, H] at positions [n] -> logits [V] of the last."""
    values, (cos, sin) = weights(), rotary()
    count = len(embeds)

    def turned(x: np.ndarray) -> np.ndarray:  # [n, heads, head_dim]
        c, s = cos[positions][:, None], sin[positions][:, None]
        left, right = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        return np.concatenate([left * c - right * s, right * c + left * s], axis=-1)

    x = embeds.astype(np.float64)
    for i in range(LAYERS):
        q = turned((x @ values[f"q{i}"]).reshape(count, HEADS, HEAD_DIM))
        k = turned((x @ values[f"k{i}"]).reshape(count, KV_HEADS, HEAD_DIM)).repeat(HEADS // KV_HEADS, axis=1)
        v = (x @ values[f"v{i}"]).reshape(count, KV_HEADS, HEAD_DIM).repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
        scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
        mixed = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed /= mixed.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", mixed, v).reshape(count, -1) @ values[f"o{i}"]
        x = x + np.maximum(x @ values[f"up{i}"], 0) @ values[f"down{i}"]
    return x[-1] @ values["head"]


def manifest(**changes: Any) -> Manifest:
    """The tiny bundle's manifest; ``vision`` and ``decoder`` in ``changes`` are dicts of fields."""
    selector = SelectorInfo(name="norm")
    vision: dict[str, Any] = {
        "file": "vision.onnx", "input": "uint8", "height": SIDE, "width": SIDE, "grid": [ROWS, ROWS],
        "tokens": TOKENS, "keep": KEEP, "channels": 3, "hidden": HIDDEN, "tap": -1, "precision": "fp32", "opset": 18,
        "selector": selector,
    }  # fmt: skip
    decoder: dict[str, Any] = {
        "file": "decoder/model.onnx", "embedding": "decoder/embed_tokens.npy", "precision": "fp32", "layers": LAYERS,
        "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN, "vocab": VOCAB, "context": CONTEXT,
        "eos": [SPECIAL.index("</s>")], "kv_cache": "growing",
    }  # fmt: skip
    fields: dict[str, Any] = {
        "model": ModelInfo("tiny", "llava"),
        "vision": VisionInfo(**(vision | changes.pop("vision", {}))),
        "decoder": DecoderInfo(**(decoder | changes.pop("decoder", {}))),
        "processor": ProcessorInfo(
            "processor/tokenizer.json", "processor/chat_template.jinja", "processor/image.json",
            SPECIAL.index("<image>"), "<image>", "<s>", "</s>",
        ),
        "positions": "compact",
        "target": "cpu",
        "golden": GoldenInfo("golden/image.png", "golden/case.json", "golden/arrays.npz"),
        "written_by": {"svdprune": "0.1.0"},
    }  # fmt: skip
    return Manifest(**(fields | changes))


def make_bundle(
    path: Path, template: str = TEMPLATE, poison: str | None = None, nan: bool = False, **changes: Any
) -> Path:
    """Write the tiny bundle; ``poison`` and ``nan`` spoil its graphs, ``changes`` go to ``manifest``."""
    made = manifest(**changes)
    with write_bundle(path) as writer:
        vision_graph(writer.file("vision.onnx"), poison, dtype=made.vision.input)
        decoder_graph(writer.file("decoder/model.onnx"), nan)
        np.save(writer.file("decoder/embed_tokens.npy"), weights()["embed"])
        tokenizer().save(str(writer.file("processor/tokenizer.json")))
        writer.file("processor/chat_template.jinja").write_text(template, encoding="utf-8")
        writer.file("processor/image.json").write_text(json.dumps(IMAGE), encoding="utf-8")
        picture().save(writer.file("golden/image.png"))
        writer.file("golden/case.json").write_text("{}", encoding="utf-8")
        np.savez(writer.file("golden/arrays.npz"), scores=np.zeros(TOKENS, np.float32))
        writer.manifest = made
    return path


def picture(seed: int = 3, size: tuple[int, int] = (40, 31)) -> Image.Image:
    """Smooth random colours, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def _save(graph: onnx.GraphProto, path: Path, opsets: dict[str, int]) -> None:
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
