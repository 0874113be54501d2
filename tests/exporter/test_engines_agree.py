"""The exported graphs as engines: the runtime's way with a static cache answers what its ONNX Runtime way answers.

The engines are ``fake_trt``'s, which compute the exported graphs on the memory of ``fake_cuda`` by ONNX Runtime: this
holds the runtime to the exporter's graphs (names, types, shapes, order of calls), not TensorRT to ONNX.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder import export_decoder
from svdprune.exporter.decoder.static_export import export_engine_decoder
from svdprune.runtime import load, open_bundle, write_bundle
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.key import EngineKey, graph_digest
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.engines.store import put_engine
from tests.exporter.text_configs import Text
from tests.exporter.text_models import save_text
from tests.runtime import tiny, tiny_engines

CACHE = 256
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": tiny.CONTEXT,
    "initializer_range": 0.3,
}  # fmt: skip
GEMMA: dict[str, Any] = SIZES | {"head_dim": 8, "sliding_window": 12}
TEXT: dict[str, Text] = {
    "llama": Text(LlamaConfig(**SIZES)),
    "qwen3": Text(Qwen3Config(**SIZES, head_dim=8)),
    "gemma2": Text(Gemma2Config(**GEMMA), {"mask": "prefix"}),
    "gemma3": Text(Gemma3TextConfig(**GEMMA, sliding_window_pattern=2), {"mask": "picture"}),
}
FIELDS = ("layers", "kv_heads", "head_dim", "kv_cache", "context", "mask", "embed_scale")
QUESTIONS = ["What is this?", "And the colour?", "Why?"]


@pytest.fixture(scope="module", params=TEXT)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with both exported decoders of a random LLaVA, float32."""
    folder = tmp_path_factory.mktemp("engines")
    wanted = TEXT[request.param]
    save_text(wanted, folder / "checkpoint")
    checkpoint = Checkpoint(folder / "checkpoint")
    text = checkpoint.config["text_config"]
    source = open_bundle(tiny.make_bundle(folder / "source"))
    with write_bundle(folder / "bundle") as writer:
        for name in source.manifest.files:
            if not name.startswith("decoder/"):
                writer.file(name).write_bytes(source.file(name).read_bytes())
        info = export_decoder(checkpoint, text, writer.path / "decoder", **wanted.export)
        engine = export_engine_decoder(checkpoint, text, writer.path / "decoder", CACHE, "fp32", **wanted.export)
        manifest = tiny.manifest(decoder={name: getattr(info, name) for name in FIELDS})
        writer.manifest = dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, engine=engine))
    return folder / "bundle"


def build(path: Path, name: str) -> None:
    """Both engines, by the fake that is installed."""
    tiny_engines.build(path, "vision", name)
    bundle, trt = open_bundle(path), find_tensorrt(name)
    assert bundle.manifest.decoder.engine is not None
    network = trt.network_from_onnx(path / bundle.manifest.decoder.engine.file)
    sizes = ((1, 16, CACHE), (1, 1, 1))
    varying = {name: shape for name, shape in network.inputs.items() if -1 in shape}
    profiles: list[Any] = [
        {
            name: tuple(tuple(n if size == -1 else size for size in shape) for n in rows)
            for name, shape in varying.items()
        }
        for rows in sizes
    ]
    data = trt.build(network, trt.config(network, profiles), BuildLog(), Progress(), "building the decoder engine")
    key = EngineKey(name, trt.version, 87, graph_digest(bundle, "decoder"), {})
    put_engine(bundle, "decoder", key, data, {"built": "", "selftest": "passed"})


@pytest.mark.parametrize(
    ("api", "policy"),
    [
        ("tensorrt-10.16", "compact"),
        ("tensorrt-11.4", "original"),
        ("tensorrt_rtx-1.7", "compact"),
        ("tensorrt_rtx-1.7", "original"),
    ],
)
def test_engines_answer_what_onnx_runtime_answers(
    exported: Path, api: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, trt = tiny_engines.machine(monkeypatch, api)
    build(exported, trt.__name__)
    reference = load(exported, threads=1, positions=policy)
    with load(exported, trt.__name__, trt.__name__, positions=policy) as vlm:
        sight, theirs = vlm.see(tiny.picture()), reference.see(tiny.picture())
        ours, wanted = vlm.first_logits(sight, QUESTIONS[0]), reference.first_logits(theirs, QUESTIONS[0])
        np.testing.assert_allclose(ours, wanted, atol=1e-3 * np.abs(wanted).max())
        chat, other = vlm.chat(sight), reference.chat(theirs)
        for question in QUESTIONS:
            answer, again = (one.ask(question, max_new_tokens=12) for one in (chat, other))
            assert answer.token_ids == again.token_ids
        assert cuda.launches > 20
    assert cuda.held == 0
