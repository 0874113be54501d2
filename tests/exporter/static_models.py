"""The decoder engine's graph driven by hand on ONNX Runtime: one buffer bound as past and present."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.config import DecoderConfig, decoder_config
from svdprune.exporter.decoder.static_export import export_engine_decoder
from tests.exporter.decoder_models import more_feeds

CACHE = 64
DTYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass
class StaticSession:
    """`start` fills the cache with garbage, so that reading a row that was never written shows."""

    config: DecoderConfig
    session: ort.InferenceSession
    cache: int
    dtype: type
    length: int = 0
    buffers: dict[str, ort.OrtValue] = field(default_factory=dict)

    def start(self) -> None:
        shape = (1, self.config.kv_heads, self.cache, self.config.head_dim)
        random, self.length = np.random.default_rng(0), 0
        names = [f"{i}.{part}" for i in range(self.config.layers) for part in ("key", "value")]
        # float16 buffers are made from an array that must outlive them: ONNX Runtime does not copy it
        self.arrays = {name: random.normal(size=shape).astype(self.dtype) for name in names}
        self.buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def append(self, embeds: np.ndarray, positions: np.ndarray, **more: np.ndarray) -> np.ndarray:
        """Rows (n, H) at positions (n,) or (3, n) -> logits (V,) of the last. more: what `more_feeds` takes."""
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(
            "inputs_embeds", ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(embeds[None], np.float32))
        )
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[..., None, :]))
        for name, array in more_feeds(self.config.deepstack, self.config.mask, embeds, **more).items():
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input("write_index", np.array([self.length]))
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.length += len(embeds)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()[0, 0]  # in the order of binding
        return logits


def load_static(folder: Path, precision: str = "fp32", cache: int = CACHE, **more: Any) -> StaticSession:
    """Export `folder`'s language model and open the graph."""
    checkpoint = Checkpoint(folder)
    text = checkpoint.config["text_config"]
    info = export_engine_decoder(checkpoint, text, folder / "engine", cache, precision, **more)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(folder / info.file, options, providers=["CPUExecutionProvider"])
    return StaticSession(decoder_config(text, **more), session, cache, DTYPES[precision])


def greedy(
    session: StaticSession, table: np.ndarray, embeds: np.ndarray, positions: np.ndarray, steps: int
) -> tuple[list[int], np.ndarray]:
    """Prefill, then one row a step: tokens, and logits (steps, V)."""
    session.start()
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    for _ in range(steps):
        rows.append(session.append(embeds, positions))
        tokens.append(int(rows[-1].argmax()))
        embeds, positions = table[tokens[-1:]], positions[-1:] + 1
    return tokens, np.stack(rows)


def pieces(length: int, cuts: Sequence[int]) -> list[slice]:
    """Slices of `length` rows, cut at `cuts`."""
    places = [0, *cuts, length]
    return [slice(a, b) for a, b in itertools.pairwise(places)]
