"""The decoder as an engine of TensorRT or TensorRT-RTX: a KV cache of fixed length in GPU memory, updated in place.

A prompt is one run of N rows, or several where it has more than the engine takes at once; a step of decoding is a run
of one row, by a CUDA graph from the second one on. Rows that a vision engine left on the GPU are copied there.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np

from svdprune.runtime.arrays import AnyArray, DeviceArray, Rows, row_count
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import check_logits, check_rows, graph_positions, more_inputs
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.open import check_tensors, open_engine
from svdprune.runtime.engines.session import EngineSession, Pieces
from svdprune.runtime.engines.tensors import Shape
from svdprune.runtime.errors import BundleError, NumericalError, UserError
from svdprune.runtime.manifest import DecoderInfo
from svdprune.runtime.vision import check_finite

_HALF_OR_FULL = ("float16", "float32")


def open_tensorrt(
    bundle: Bundle, threads: int | None = None, device: Device | None = None, verify: bool = True
) -> EngineDecoder:
    """The backend ``tensorrt``: full TensorRT 10 or 11. CPU ``threads`` do not matter to it."""
    return _open("tensorrt", bundle, device, verify)


def open_tensorrt_rtx(
    bundle: Bundle, threads: int | None = None, device: Device | None = None, verify: bool = True
) -> EngineDecoder:
    """The backend ``tensorrt_rtx``. CPU ``threads`` do not matter to it."""
    return _open("tensorrt_rtx", bundle, device, verify)


def _open(name: str, bundle: Bundle, device: Device | None, verify: bool) -> EngineDecoder:
    info = bundle.manifest.decoder
    if info.engine is None:
        reason = info.engine_refused or "it was exported without one"
        raise UserError(
            f"{bundle.path} has no decoder graph for engines ({reason}): use the decoder backend `onnxruntime`, which "
            "goes with any vision backend"
        )
    with open_engine(bundle, "decoder", name, device, verify) as engine:
        return EngineDecoder(
            engine.trt, engine.data, engine.device, info, engine.where, engine.host_code, device is None
        )


class EngineDecoder:
    """A ``Decoder`` over an engine.

    Each state has a KV cache of its own from its first rows on; one that nobody uses any more leaves it to the next.

    Args:
        trt: the library that built the engine.
        data: the serialised engine.
        device: where it runs.
        info: the manifest's ``decoder``.
        where: what to call the engine in messages.
        host_code: it may hold code for the CPU.
        owns_device: close the device, too, in the end.

    Attributes:
        capacity: rows of the KV cache.

    Raises:
        BundleError: the engine's inputs or outputs are not the contract's, or its sizes not the manifest's.
        EngineFault, UserError: see ``EngineSession``.
    """

    def __init__(
        self,
        trt: Installation,
        data: Any,
        device: Device,
        info: DecoderInfo,
        where: str,
        host_code: bool = False,
        owns_device: bool = False,
    ) -> None:
        self.name, self.device, self.info = trt.name, device, info
        self._owns_device = owns_device
        ends = [f"{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
        self.past = [f"past.{end}" for end in ends]
        alias = {f"present.{end}": f"past.{end}" for end in ends}
        self.session = EngineSession(trt, data, device, where, alias=alias, host_code=host_code)
        wanted: dict[str, str | tuple[str, ...]] = {"inputs_embeds": "float32", "logits": "float32"}
        wanted |= {"position_ids": "int64", "write_index": "int64"}
        wanted |= {"deepstack": "float32"} if info.deepstack else {}
        wanted |= {"groups": "int64"} if info.mask != "causal" else {}
        wanted |= dict.fromkeys((*alias, *self.past), _HALF_OR_FULL)
        try:
            check_tensors(self.session, wanted)
            self.capacity: int | None = self._cache_rows()
        except BaseException:
            self.session.close()
            raise
        self._idle: list[dict[str, DeviceArray]] = []
        self._caches = 0

    @property
    def most(self) -> int:
        """How many rows one run takes."""
        return self.session.largest["inputs_embeds"][1]

    def start(self) -> EngineState:
        """A state without rows, and without a KV cache until it gets some."""
        return EngineState(self)

    def lend_cache(self, state: EngineState) -> dict[str, DeviceArray]:
        """A KV cache, zeroed when new, for as long as ``state`` lives.

        Raises:
            UserError: there is no memory for another one.
        """
        if not self._idle and self._caches:
            gc.collect()  # a chat whose stream was not read to its end holds itself until then
        if not self._idle:
            self._idle.append(self.session.allocate(self.past, f"the KV cache of {self.capacity:,} rows"))
            self._caches += 1
        cache = self._idle.pop()
        weakref.finalize(state, self._idle.append, cache).atexit = False
        return cache

    def close(self) -> None:
        """See ``Decoder.close``."""
        self.session.close()
        if self._owns_device:
            self.device.close()

    def _cache_rows(self) -> int:
        """Rows of the KV cache, after a look at every size."""
        info, shapes = self.info, {name: tensor.shape for name, tensor in self.session.tensors.items()}
        rows = shapes[self.past[0]][2] if len(shapes[self.past[0]]) == 4 else 0
        wanted: dict[str, Shape] = dict.fromkeys(self.past, (1, info.kv_heads, rows, info.head_dim))
        wanted |= {"inputs_embeds": (1, -1, info.hidden), "logits": (1, 1, info.vocab)}
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise BundleError(
                    f"{self.session.where} has {name} {list(shapes[name])}, the manifest says {list(shape)}: "
                    "export the bundle and build the engine again"
                )
        return rows


class EngineState:
    """A ``DecoderState``: how many rows of a KV cache count."""

    def __init__(self, decoder: EngineDecoder) -> None:
        self._decoder = decoder
        self._cache: dict[str, DeviceArray] = {}
        self._length = 0

    @property
    def length(self) -> int:
        """Rows in the cache."""
        return self._length

    def append(
        self,
        embeds: Rows,
        positions: np.ndarray,
        deepstack: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """See ``DecoderState.append``. Rows of one group must come in one run of the engine."""
        decoder, rows = self._decoder, row_count(embeds)
        check_rows(embeds, positions, decoder.info, deepstack, groups)
        capacity = decoder.capacity or 0
        if self._length + rows > capacity:
            raise UserError(
                f"the decoder engine's cache holds {capacity:,} rows, {self._length:,} are taken and {rows:,} more are "
                "wanted: ask a shorter question, start a new chat, or export with a larger --cache"
            )
        self._cache = self._cache or decoder.lend_cache(self)
        pieces: list[AnyArray] = [embeds] if isinstance(embeds, np.ndarray) else list(embeds)
        done = 0
        while done < rows:
            count = min(rows - done, decoder.most)
            count = _whole_groups(groups, done, count)
            start = self._length + done
            outputs = decoder.session.run(
                {
                    "inputs_embeds": Pieces((1, count, decoder.info.hidden), _part(pieces, done, done + count)),
                    "position_ids": graph_positions(positions[..., done : done + count]),
                    "write_index": np.array([start], np.int64),
                    **more_inputs(
                        decoder.info,
                        count,
                        None if deepstack is None else deepstack[:, done : done + count],
                        None if groups is None else groups[done : done + count],
                    ),
                },
                in_place=self._cache,
                repeats=count == 1,
            )
            done += count
        logits = outputs["logits"]
        assert isinstance(logits, np.ndarray)  # it was not asked to stay on the device
        try:
            check_logits(logits)
        except NumericalError:
            self._clear(self._length, self._length + rows)
            for piece in pieces:
                if isinstance(piece, DeviceArray):  # not looked at before: the fault may be the vision engine's
                    check_finite("features", piece.host())
            raise
        self._length += rows
        return logits[0, -1]

    def truncate(self, length: int) -> None:
        """See ``DecoderState.truncate``: what lies behind the length is never read."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot cut a cache of {self._length} rows to {length}")
        self._length = length

    def _clear(self, start: int, stop: int) -> None:
        """Zeros in place of rows: a masked row has no weight, but no weight times NaN is NaN all the same."""
        for array in self._cache.values():
            _, heads, rows, width = array.shape
            size = width * array.dtype.itemsize
            self._decoder.device.clear_rows(array.pointer + start * size, rows * size, (stop - start) * size, heads)


def _whole_groups(groups: np.ndarray | None, start: int, count: int) -> int:
    """``count`` rows from ``start``, or fewer where the last of them would part a group.

    Raises:
        UserError: a group that is longer than one run.
    """
    stop = start + count
    if groups is None or stop >= len(groups) or groups[stop] < 0 or groups[stop] != groups[stop - 1]:
        return count
    inside = np.flatnonzero(groups[start:stop] != groups[stop])
    if not len(inside):
        raise UserError(
            f"the rows that see each other are more than the {count:,} that the decoder engine takes at once: prune "
            "harder, or export with a larger --cache"
        )
    return int(inside[-1]) + 1


def _part(pieces: list[AnyArray], start: int, stop: int) -> list[AnyArray]:
    """Rows ``start`` to ``stop`` of the pieces one after another."""
    found: list[AnyArray] = []
    begin = 0
    for piece in pieces:
        first, last = max(start - begin, 0), min(stop - begin, len(piece))
        if first < last:
            found.append(piece[first:last] if isinstance(piece, np.ndarray) else piece.part(first, last))
        begin += len(piece)
    return found
