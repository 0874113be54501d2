"""The decoder graph on ONNX Runtime, its keys and values left where the graph wrote them (IO binding)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.arrays import Rows, host_rows, row_count
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import check_logits, check_rows, graph_positions, more_inputs
from svdprune.runtime.decoder.kv_cache import GrowingCache, KvCache, SharedCache
from svdprune.runtime.errors import BundleError
from svdprune.runtime.manifest import DecoderInfo
from svdprune.runtime.ort import check_names, open_session, ort_errors

_INPUTS = {"inputs_embeds": "tensor(float)", "attention_mask": "tensor(int64)", "position_ids": "tensor(int64)"}


def open_decoder(bundle: Bundle, threads: int | None = None) -> OnnxDecoder:
    """The backend ``onnxruntime``: the bundle's decoder graph on the CPU."""
    info = bundle.manifest.decoder
    path = bundle.file(info.file)
    return OnnxDecoder(open_session(path, threads), path, info)


class OnnxDecoder:
    """A ``Decoder`` over an ``onnxruntime.InferenceSession``.

    Raises:
        BundleError: the graph's inputs or outputs are not the contract's.
    """

    name = "onnxruntime"
    device = None
    capacity = None

    def __init__(self, session: Any, path: Path, info: DecoderInfo) -> None:
        self.session, self.path, self.info = session, path, info
        self.past = [f"past_key_values.{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
        self.present = [f"present.{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
        more = {"deepstack": "tensor(float)"} if info.deepstack else {}
        more |= {"groups": "tensor(int64)"} if info.mask != "causal" else {}
        check_names(path, "input", [*_INPUTS, *more, *self.past], [item.name for item in session.get_inputs()])
        check_names(path, "output", ["logits", *self.present], [item.name for item in session.get_outputs()])
        types = {item.name: item.type for item in session.get_inputs()}
        for name, wanted in (_INPUTS | more).items():
            if types[name] != wanted:
                raise BundleError(f"{path} takes {name} as {types[name]}, not {wanted}: export the bundle again")
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        axes = {item.name: len(item.shape) for item in session.get_inputs()}["position_ids"]
        if axes != (2 if info.position_axes == 1 else 3):
            raise BundleError(
                f"{path} takes positions of another number of axes than {info.position_axes}: export again"
            )
        if types[self.past[0]] not in kinds:
            raise BundleError(f"{path} keeps its cache as {types[self.past[0]]}: export the bundle again")
        self.cache_dtype = kinds[types[self.past[0]]]

    def start(self) -> OnnxState:
        """A state without rows."""
        shape = (self.info.kv_heads, self.info.head_dim)
        tensors = 2 * self.info.layers
        cache: KvCache
        if self.info.kv_cache == "shared":
            cache = SharedCache(tensors, shape, self.cache_dtype, self.info.context)
        else:
            cache = GrowingCache(tensors, shape, self.cache_dtype)
        return OnnxState(self, cache)

    def close(self) -> None:
        """See ``Decoder.close``."""
        self.session = None


class OnnxState:
    """A ``DecoderState``: a cache and the session that extends it."""

    def __init__(self, decoder: OnnxDecoder, cache: KvCache) -> None:
        self._decoder, self._cache = decoder, cache

    @property
    def length(self) -> int:
        """Rows in the cache."""
        return self._cache.length

    def append(
        self,
        embeds: Rows,
        positions: np.ndarray,
        deepstack: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """See ``DecoderState.append``."""
        decoder, rows = self._decoder, row_count(embeds)
        check_rows(embeds, positions, decoder.info, deepstack, groups)
        total = self._cache.length + rows
        binding = decoder.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(host_rows(embeds)[None], np.float32))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", graph_positions(positions))
        for name, array in more_inputs(decoder.info, rows, deepstack, groups).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        self._cache.bind(binding, decoder.past, decoder.present, rows)
        try:
            decoder.session.run_with_iobinding(binding)
        except ort_errors() as error:
            raise BundleError(f"{decoder.path} failed to run ({error}): export the bundle again") from error
        outputs = binding.get_outputs()
        self._cache.keep(outputs[1:], rows)
        logits = outputs[0].numpy()  # [1, n or 1, V]
        return check_logits(logits[0, -1].astype(np.float32))

    def truncate(self, length: int) -> None:
        """See ``DecoderState.truncate``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} rows to {length}")
        self._cache.truncate(length)
