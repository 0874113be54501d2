"""Arrays that lie in the computer's memory or in a GPU's, and dataclass fields that fetch the latter when read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from svdprune.runtime.engines.device import Device


T = TypeVar("T")


class Memory(Protocol):
    """A place in GPU memory that stays valid while the object lives."""

    device: Device

    @property
    def pointer(self) -> int:
        """The address now; a place that is moved has another later.

        Raises:
            UserError: what held it was closed.
        """
        ...


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in GPU memory.

    Attributes:
        memory: where it lies; kept alive by this array.
        offset: bytes from the start of ``memory``.
        shape, dtype: as NumPy's.
    """

    memory: Memory
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0

    @property
    def pointer(self) -> int:
        """The address of its first byte."""
        return self.memory.pointer + self.offset

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceArray:
        """The part at ``index`` of the first axis, in place."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of an array with {len(self)} parts")
        step = self.nbytes // len(self)
        return DeviceArray(self.memory, self.shape[1:], self.dtype, self.offset + index * step)

    def part(self, start: int, stop: int) -> DeviceArray:
        """The parts from ``start`` to ``stop`` of the first axis, in place; at least one."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"parts {start} to {stop} of an array with {len(self)}")
        step = self.nbytes // len(self)
        return DeviceArray(self.memory, (stop - start, *self.shape[1:]), self.dtype, self.offset + start * step)

    def host(self) -> np.ndarray:
        """A copy in the computer's memory."""
        return self.memory.device.download(self)


AnyArray = np.ndarray | DeviceArray
Rows = np.ndarray | Sequence[AnyArray]
"""Rows [n, H] whole, or as pieces [n_i, H] that follow one another."""


def row_count(rows: Rows) -> int:
    """How many rows there are."""
    return len(rows) if isinstance(rows, np.ndarray) else sum(map(len, rows))


def host_rows(rows: Rows) -> np.ndarray:
    """The rows [n, H] as one array in the computer's memory."""
    if isinstance(rows, np.ndarray):
        return rows
    return np.concatenate([piece if isinstance(piece, np.ndarray) else piece.host() for piece in rows])


def fetched_on_read(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator over a dataclass: its field ``name`` takes an array from either memory and reads as NumPy's.

    The copy to the host is made when the field is first read. ``passed`` hands over an array of a GPU, ``held`` gives
    what was handed over.
    """

    def decorate(kind: type[T]) -> type[T]:
        setattr(kind, name, _FetchedOnRead(name))
        return kind

    return decorate


def passed(array: AnyArray) -> np.ndarray:
    """``array`` for a field that is fetched on read, whose type says what reading it gives."""
    return cast(np.ndarray, array)


def held(owner: object, name: str) -> AnyArray:
    """What was handed over to the field ``name`` that is fetched on read, where it lies."""
    array: AnyArray = vars(owner)[f"_{name}_held"]
    return array


class _FetchedOnRead:
    def __init__(self, name: str) -> None:
        self._held, self._fetched = f"_{name}_held", f"_{name}_fetched"

    def __get__(self, owner: object, kind: type) -> np.ndarray:
        values = vars(owner)
        if self._fetched not in values:
            array: AnyArray = values[self._held]
            values[self._fetched] = array if isinstance(array, np.ndarray) else array.host()
        fetched: np.ndarray = values[self._fetched]
        return fetched

    def __set__(self, owner: object, value: AnyArray) -> None:
        vars(owner)[self._held] = value
