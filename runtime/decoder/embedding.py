"""The token embedding table, mapped from its file: only the rows that are looked up are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from svdprune.runtime.errors import BundleError


class Embedding:
    """``embed_tokens.npy``, float16 or float32 [V, H], whose rows are multiplied by ``scale`` when they are read.

    Raises:
        BundleError: not such a file, or its shape is not the manifest's.
    """

    def __init__(self, path: Path, vocab: int, hidden: int, scale: float = 1.0) -> None:
        try:
            self._table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{path} is not a table of numbers ({error}): export the bundle again") from error
        if not isinstance(self._table, np.ndarray) or self._table.dtype not in (np.float16, np.float32):
            raise BundleError(f"{path} must be float16 or float32: export the bundle again")
        if self._table.shape != (vocab, hidden):
            raise BundleError(
                f"{path} is {list(self._table.shape)}, the manifest says [{vocab}, {hidden}]: export the bundle again"
            )
        self._path, self._scale = path, np.float32(scale)

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings float32 [n, H] of token ids [n].

        Raises:
            BundleError: an id outside the table: the tokenizer and the decoder are not of one model.
        """
        index = np.asarray(ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self._table)):
            raise BundleError(
                f"the token id {int(index.max())} is outside {self._path}, which has {len(self._table):,} rows: "
                "export the bundle again"
            )
        rows: np.ndarray = self._table[index].astype(np.float32)
        return rows if self._scale == 1 else rows * self._scale
