"""The reference decoder: the original checkpoint in transformers, float32, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdprune.runtime.arrays import Rows, host_rows
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import check_logits, check_rows
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require


def open_decoder(bundle: Bundle, threads: int | None, checkpoint: str) -> TransformersDecoder:
    """The backend ``transformers``.

    Args:
        bundle: the embeddings' table and the sizes come from here.
        threads: sets torch's threads for the whole process when given.
        checkpoint: folder or hub id of the vision-language model, or of its language model alone.

    Raises:
        MissingDependency: torch or transformers are not installed.
        UserError: no such checkpoint, or its language model has other sizes than the bundle's.
    """
    torch = require("torch", "export", "the transformers decoder")
    transformers = require("transformers", "export", "the transformers decoder")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        whole = hasattr(config, "vision_config")
        auto = transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(checkpoint, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint} cannot be loaded ({_first_line(error)}): check the path") from error
    language = model.model.language_model if whole else model.model
    hidden, vocab = language.config.hidden_size, model.lm_head.out_features
    info = bundle.manifest.decoder
    if (hidden, vocab) != (info.hidden, info.vocab):
        raise UserError(
            f"{checkpoint} has hidden size {hidden} and vocabulary {vocab:,}, the bundle {info.hidden} and "
            f"{info.vocab:,}: give the checkpoint it was exported from"
        )
    return TransformersDecoder(language, model.lm_head)


class TransformersDecoder:
    """A ``Decoder`` over a transformers language model (embeddings to hidden states) and its head."""

    name = "transformers"
    device = None
    capacity = None

    def __init__(self, language: Any, head: Any) -> None:
        self.language, self.head = language, head

    def start(self) -> TransformersState:
        """A state without rows."""
        return TransformersState(self)

    def close(self) -> None:
        """See ``Decoder.close``."""
        self.language = self.head = None


class TransformersState:
    """A ``DecoderState`` over a ``DynamicCache``."""

    def __init__(self, decoder: TransformersDecoder) -> None:
        import transformers

        self._decoder = decoder
        self._cache = transformers.DynamicCache()

    @property
    def length(self) -> int:
        """Rows in the cache."""
        return int(self._cache.get_seq_length())

    def append(self, embeds: Rows, positions: np.ndarray) -> np.ndarray:
        """See ``DecoderState.append``.

        The mask of ones matters: without one, transformers reads gaps in the positions as several packed sequences.
        """
        import torch

        check_rows(embeds, positions, self._decoder.language.config.hidden_size)
        rows = host_rows(embeds)
        total = self.length + len(rows)
        with torch.inference_mode():
            output = self._decoder.language(
                inputs_embeds=torch.tensor(rows[None], dtype=torch.float32),
                attention_mask=torch.ones((1, total), dtype=torch.int64),
                position_ids=torch.tensor(positions[None], dtype=torch.int64),
                past_key_values=self._cache,
                use_cache=True,
            )
            logits = self._decoder.head(output.last_hidden_state[:, -1])  # [1, V]
        return check_logits(logits[0].numpy())

    def truncate(self, length: int) -> None:
        """See ``DecoderState.truncate``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} rows to {length}")
        if length == 0:
            import transformers

            self._cache = transformers.DynamicCache()
        elif length < self.length:
            self._cache.crop(length - self.length)  # negative: how many rows to drop


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
