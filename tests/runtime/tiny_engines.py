"""The tiny bundle with a decoder graph for engines, and engines of it built by the fakes.

The graph keeps the contract of the exporter's ``engine.onnx`` in operators that every ONNX Runtime and every fake has;
it computes what ``tiny.reference_logits`` does.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import fake_trt
import numpy as np
import onnx
import pytest
import tiny
from fake_cuda import FakeCuda, install, run_engines
from onnx import TensorProto, helper, numpy_helper

from svdprune.runtime import open_bundle
from svdprune.runtime.bundle import write_bundle
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.key import EngineKey, graph_digest
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.engines.store import EngineFile, put_engine
from svdprune.runtime.manifest import DecoderEngineInfo

CACHE = 96
APIS = tuple(fake_trt.VERSIONS)


def decoder_engine_graph(path: Path, cache: int = CACHE, nan_below: float | None = None) -> None:
    """Write the decoder over a cache of fixed length.

    Args:
        cache: its rows. nan_below: logits of a last row whose first number is below this are NaN.
    """
    heads, kv_heads, width = tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_DIM
    constants: dict[str, np.ndarray] = {name: array for name, array in tiny.weights().items() if name != "embed"}
    cos, sin = tiny.rotary()
    constants |= {"cos": cos, "sin": sin, "scale": np.array(width**-0.5, np.float32)}
    nodes: list[Any] = []

    def op(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def const(name: str, value: Any, dtype: Any = np.int64) -> str:
        constants[name] = np.array(value, dtype)
        return name

    count = op("Gather", [op("Shape", ["inputs_embeds"], "shape"), const("one", 1)], "count")
    new = op("Add", [op("Range", [const("zero", 0), count, "one"], "range"), "write_index"], "new")  # (N,)
    column = op("Reshape", [new, const("as_column", [-1, 1])], "column")
    seen = op("LessOrEqual", [const("rows", np.arange(cache)), column], "seen")  # (N, C)
    turn = {}
    for name in ("cos", "sin"):
        gathered = op("Gather", [name, "position_ids"], f"{name}_at")
        turn[name] = op("Reshape", [gathered, const("as_turn", [1, 1, -1, width // 2])], f"{name}_n")
    place = op("Reshape", [new, const("as_place", [1, 1, -1, 1])], "place")
    x = "inputs_embeds"
    for i in range(tiny.LAYERS):
        split = {}
        for part, many in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            flat = op("MatMul", [x, f"{part}{i}"], f"{part}_{i}")
            cut = op("Reshape", [flat, const(f"as_{many}", [1, -1, many, width])], f"{part}_cut{i}")
            split[part] = op("Transpose", [cut], f"{part}_heads{i}", perm=[0, 2, 1, 3])  # (1, heads, N, width)
        for part in ("q", "k"):
            nodes.append(
                helper.make_node("Split", [split[part]], [f"{part}l{i}", f"{part}r{i}"], axis=3, num_outputs=2)
            )
            left = op("Sub", [op("Mul", [f"{part}l{i}", turn["cos"]], f"{part}a{i}"),
                              op("Mul", [f"{part}r{i}", turn["sin"]], f"{part}b{i}")], f"{part}c{i}")  # fmt: skip
            right = op("Add", [op("Mul", [f"{part}r{i}", turn["cos"]], f"{part}d{i}"),
                               op("Mul", [f"{part}l{i}", turn["sin"]], f"{part}e{i}")], f"{part}f{i}")  # fmt: skip
            split[part] = op("Concat", [left, right], f"{part}_turned{i}", axis=3)
        whole = {}
        for part, name in (("k", "key"), ("v", "value")):
            where = op("Expand", [place, op("Shape", [split[part]], f"{part}_shape{i}")], f"{part}_place{i}")
            present = op("ScatterElements", [f"past.{i}.{name}", where, split[part]], f"present.{i}.{name}", axis=2)
            wide = op("Unsqueeze", [present, const("two", [2])], f"{part}_wide{i}")  # (1, kv, 1, C, width)
            grown = op(
                "Expand", [wide, const("group", [1, kv_heads, heads // kv_heads, cache, width])], f"{part}_grown{i}"
            )
            whole[part] = op("Reshape", [grown, const("all", [1, heads, cache, width])], f"{part}_all{i}")
        keys = op("Transpose", [whole["k"]], f"keys{i}", perm=[0, 1, 3, 2])
        scores = op("Mul", [op("MatMul", [split["q"], keys], f"products{i}"), "scale"], f"scores{i}")
        masked = op("Where", [seen, scores, const("never", -np.inf, np.float32)], f"masked{i}")
        mixed = op("MatMul", [op("Softmax", [masked], f"weights{i}", axis=-1), whole["v"]], f"mixed{i}")
        back = op("Transpose", [mixed], f"back{i}", perm=[0, 2, 1, 3])
        joined = op("Reshape", [back, const("joined", [1, -1, heads * width])], f"joined{i}")
        after = op("Add", [x, op("MatMul", [joined, f"o{i}"], f"out{i}")], f"after{i}")
        relu = op("Relu", [op("MatMul", [after, f"up{i}"], f"up_{i}")], f"relu{i}")
        x = op("Add", [after, op("MatMul", [relu, f"down{i}"], f"down_{i}")], f"x{i}")
    last = op("Gather", [x, const("end", [-1])], "last", axis=1)
    if nan_below is None:
        op("MatMul", [last, "head"], "logits")
    else:
        logits = op("MatMul", [last, "head"], "clean")
        first = op(
            "Gather",
            [op("Gather", ["inputs_embeds", "end"], "last_row", axis=1), const("first", [0])],
            "number",
            axis=2,
        )
        bad = op("Less", [first, const("limit", nan_below, np.float32)], "bad")
        op("Where", [bad, const("nan", np.nan, np.float32), logits], "logits")
    used = {name for node in nodes for name in node.input}
    floats, whole_numbers = TensorProto.FLOAT, TensorProto.INT64
    ends = [f"{i}.{part}" for i in range(tiny.LAYERS) for part in ("key", "value")]
    shape = [1, kv_heads, cache, width]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            helper.make_tensor_value_info("inputs_embeds", floats, [1, "new", tiny.HIDDEN]),
            helper.make_tensor_value_info("position_ids", whole_numbers, [1, "new"]),
            helper.make_tensor_value_info("write_index", whole_numbers, [1]),
            *(helper.make_tensor_value_info(f"past.{end}", floats, shape) for end in ends),
        ],
        [
            helper.make_tensor_value_info("logits", floats, [1, 1, tiny.VOCAB]),
            *(helper.make_tensor_value_info(f"present.{end}", floats, shape) for end in ends),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def engine_bundle(path: Path, cache: int = CACHE, nan_below: float | None = None, **changes: Any) -> Path:
    """The tiny bundle with ``decoder/engine.onnx``; ``changes`` go to ``tiny.make_bundle``."""
    source = open_bundle(tiny.make_bundle(path.with_name(path.name + "-source"), **changes))
    with write_bundle(path) as writer:
        for name in source.manifest.files:
            shutil.copy(source.path / name, writer.file(name))
        decoder_engine_graph(writer.file("decoder/engine.onnx"), cache, nan_below)
        engine = DecoderEngineInfo("decoder/engine.onnx", "fp32", 18, cache)
        writer.manifest = dataclasses.replace(
            source.manifest, decoder=dataclasses.replace(source.manifest.decoder, engine=engine)
        )
    return path


def build(
    path: Path, part: str, name: str = "tensorrt", sm: int = 87, batch: int = 2, rows: int = CACHE, alike: bool = True
) -> EngineFile:
    """Build an engine by the fake that is installed, and put it into the bundle.

    Args:
        path: the bundle. batch: most pictures at once. rows: most rows of the decoder at once.
        alike: its second profile takes as many, and not one alone; either way it is tuned for one.
    """
    bundle = open_bundle(path)
    info, trt = bundle.manifest, find_tensorrt(name)
    if part == "vision":
        file, size = (
            info.vision.file,
            (tiny.SIDE, tiny.SIDE, 3) if info.vision.input == "uint8" else (3, tiny.SIDE, tiny.SIDE),
        )
        profiles: list[Any] = [{"pixels": ((1, *size), (1, *size), (batch, *size))}]
    else:
        assert info.decoder.engine is not None
        file = info.decoder.engine.file
        profiles = [
            {"inputs_embeds": tuple((1, n, tiny.HIDDEN) for n in most), "position_ids": tuple((1, n) for n in most)}
            for most in ((1, min(16, rows), rows), (1, 1, rows if alike else 1))
        ]
    network = trt.network_from_onnx(path / file)
    data = trt.build(network, trt.config(network, profiles), BuildLog(), Progress(), f"building the {part} engine")
    key = EngineKey(name, trt.version, sm, graph_digest(bundle, part), {"rows": rows})
    return put_engine(bundle, part, key, data, {"built": "2026-01-01T00:00:00+00:00", "selftest": "passed"})


def machine(monkeypatch: pytest.MonkeyPatch, api: str = "tensorrt-10.3", sm: int = 87) -> tuple[FakeCuda, Any]:
    """A machine with a GPU and a TensorRT, both fakes: (CUDA, TensorRT's module)."""
    cuda = install(monkeypatch, FakeCuda(sm))
    trt = fake_trt.install(monkeypatch, fake_trt.make_trt(api, sm))
    run_engines(cuda, trt)
    return cuda, trt
