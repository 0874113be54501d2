"""Decoder backends: rows of embeddings in, logits of the last row out, the keys and values kept in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from svdprune.runtime.arrays import Rows, row_count
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.manifest import DecoderInfo
from svdprune.runtime.registry import Registry

if TYPE_CHECKING:
    from svdprune.runtime.engines.device import Device


class DecoderState(Protocol):
    """One conversation's rows in the decoder."""

    @property
    def length(self) -> int:
        """How many rows the cache holds."""
        ...

    def append(
        self,
        embeds: Rows,
        positions: np.ndarray,
        deepstack: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """Put rows after those in the cache.

        Args:
            embeds: float32 [n, H], n of 1 or more, whole or in pieces; pieces may lie on the decoder's ``device``.
            positions: int64 [n], or [3, n] for a decoder with positions of three axes; gaps are allowed.
            deepstack: float32 [L, n, H], level l is added to the hidden states after layer l; None for zeros.
            groups: int64 [n]; rows of one group (0 or more) see each other in both directions, -1 is in none. None
                puts no row in a group. Only for a decoder with a mask that has groups.

        Returns:
            float32 [V], the logits after the last row.

        Raises:
            NumericalError: NaN or infinity in the logits.
            UserError: more rows than the decoder's ``capacity``.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget every row from ``length`` on."""
        ...


class Decoder(Protocol):
    """Makes states that share one set of weights.

    Attributes:
        name: of the backend.
        device: the GPU on which it takes rows in place, None where they must come from the host.
        capacity: the most rows that a state holds; None where only the bundle's context bounds them.
    """

    name: str
    device: Device | None
    capacity: int | None

    def start(self) -> DecoderState:
        """A state without rows."""
        ...

    def close(self) -> None:
        """Give back what it and its states hold; they cannot be used after that."""
        ...


BACKENDS = Registry(
    "decoder backend",
    {
        "onnxruntime": "svdprune.runtime.decoder.onnxruntime:open_decoder",
        "transformers": "svdprune.runtime.decoder.transformers:open_decoder",
        "tensorrt": "svdprune.runtime.decoder.tensorrt:open_tensorrt",
        "tensorrt_rtx": "svdprune.runtime.decoder.tensorrt:open_tensorrt_rtx",
    },
)


def open_decoder(
    name: str,
    bundle: Bundle,
    threads: int | None = None,
    checkpoint: str | None = None,
    device: Device | None = None,
    verify: bool = True,
) -> Decoder:
    """Open the decoder with the backend ``name``.

    Args:
        bundle: an opened bundle.
        threads: CPU threads, None for all; engines have no use for it.
        checkpoint: the folder (or hub id) of the weights; ``transformers`` needs it, the others refuse it.
        device: an opened GPU for an engine to share; None opens one where needed.
        verify: compare the SHA-256 of an engine's file first.

    Raises:
        UserError: unknown backend, not available here, no engine built for it, or ``checkpoint`` given or missing
            against the above.
        BundleError: the graph or engine cannot be used.
    """
    opener = BACKENDS.find(name)
    if name == "transformers":
        if checkpoint is None:
            raise UserError(
                "the transformers decoder reads the original weights, which a bundle does not hold: "
                "give checkpoint=, the folder or hub id it was exported from"
            )
        decoder: Decoder = opener(bundle, threads, checkpoint)
        return decoder
    if checkpoint is not None:
        raise UserError(f"the decoder {name} runs from the bundle alone: leave out checkpoint=")
    decoder = opener(bundle, threads) if name == "onnxruntime" else opener(bundle, threads, device, verify)
    return decoder


def check_rows(
    embeds: Rows,
    positions: np.ndarray,
    info: DecoderInfo,
    deepstack: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> None:
    """Refuse rows that do not fit together or the decoder: a caller's bug, so a ``ValueError``."""
    shapes = [piece.shape for piece in ([embeds] if isinstance(embeds, np.ndarray) else embeds)]
    count, hidden, axes = row_count(embeds), info.hidden, info.position_axes
    fits = all(len(shape) == 2 and shape[1] == hidden for shape in shapes)
    if not fits or count < 1 or positions.shape != ((count,) if axes == 1 else (axes, count)):
        raise ValueError(
            f"rows {shapes} and positions {positions.shape} of {axes} axes do not fit a hidden size of {hidden}"
        )
    if deepstack is not None and (not info.deepstack or deepstack.shape != (info.deepstack, count, hidden)):
        raise ValueError(f"deepstack {deepstack.shape} does not fit {info.deepstack} levels of {count} rows")
    if groups is not None and (info.mask == "causal" or groups.shape != (count,)):
        raise ValueError(f"groups {groups.shape} do not fit {count} rows and the mask {info.mask}")


def more_inputs(
    info: DecoderInfo, count: int, deepstack: np.ndarray | None, groups: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The inputs of a decoder graph that only some models have, for ``count`` rows of one sequence, by name.

    ``deepstack`` float32 [L, 1, n, H] and ``groups`` int64 [1, n]: see ``DecoderState.append``.
    """
    inputs: dict[str, np.ndarray] = {}
    if info.deepstack:
        given = np.zeros((info.deepstack, count, info.hidden), np.float32) if deepstack is None else deepstack
        inputs["deepstack"] = np.ascontiguousarray(given[:, None], np.float32)
    if info.mask != "causal":
        given = np.full(count, -1, np.int64) if groups is None else groups
        inputs["groups"] = np.ascontiguousarray(given[None], np.int64)
    return inputs


def row_shapes(info: DecoderInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of those inputs of the decoder graph for engines that hold the new rows, by name; -1 for their count."""
    axes = () if info.position_axes == 1 else (info.position_axes,)
    shapes: dict[str, tuple[int, ...]] = {"inputs_embeds": (1, -1, info.hidden), "position_ids": (*axes, 1, -1)}
    if info.deepstack:
        shapes["deepstack"] = (info.deepstack, 1, -1, info.hidden)
    if info.mask != "causal":
        shapes["groups"] = (1, -1)
    return shapes


def graph_positions(positions: np.ndarray) -> np.ndarray:
    """``position_ids`` of a decoder graph for one sequence: int64 [1, n], or [3, 1, n]."""
    return np.ascontiguousarray(positions[None] if positions.ndim == 1 else positions[:, None], np.int64)


def check_logits(logits: np.ndarray) -> np.ndarray:
    """The logits [V], when all are finite.

    Raises:
        NumericalError: NaN or infinity.
    """
    if not np.isfinite(logits).all():
        raise NumericalError(
            "the decoder gave NaN or infinite logits: no token was chosen; export with a higher precision"
        )
    return logits
