"""The reference decoder: the original checkpoint in transformers, float32, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdprune.runtime.arrays import Rows, host_rows
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import check_logits, check_rows, graph_positions
from svdprune.runtime.errors import UserError
from svdprune.runtime.lazy import require
from svdprune.runtime.manifest import DecoderInfo


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
    language = model.get_decoder()
    hidden, vocab = language.config.hidden_size, model.lm_head.out_features
    info = bundle.manifest.decoder
    if (hidden, vocab) != (info.hidden, info.vocab):
        raise UserError(
            f"{checkpoint} has hidden size {hidden} and vocabulary {vocab:,}, the bundle {info.hidden} and "
            f"{info.vocab:,}: give the checkpoint it was exported from"
        )
    return TransformersDecoder(model, info)


def language_logits(
    model: Any,
    embeds: Any,
    positions: np.ndarray,
    cache: Any,
    deepstack: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Any:
    """Run a model's language half as the model itself does.

    The mask of ones matters: without one, transformers reads gaps in the positions as several packed sequences.

    Args:
        model: of transformers, with its head: a vision-language model, or a language model alone.
        embeds: torch tensor [1, n, H].
        positions, deepstack, groups: as ``DecoderState.append`` takes them.
        cache: holds the rows before these, and these afterwards.

    Returns:
        Torch tensor float32 [V], the logits after the last row.

    Raises:
        UserError: groups, with a language model alone, whose masks know none.
    """
    import torch

    count, seen = embeds.shape[1], int(cache.get_seq_length())
    language: Any = model.get_decoder()
    run = language
    more: dict[str, Any] = {}
    if deepstack is not None:
        more["visual_pos_masks"] = torch.ones((1, count), dtype=torch.bool)
        more["deepstack_visual_embeds"] = [torch.from_numpy(level).to(embeds.dtype) for level in deepstack]
    if groups is not None and (groups >= 0).any():
        run = model.model  # which makes the masks from the types of the rows
        if run is language:
            raise UserError("a language model alone cannot mask the rows of a picture: give the whole checkpoint")
        types = np.concatenate([np.zeros(seen, np.int64), groups >= 0])
        if model.config.model_type == "paligemma":  # there 0 is what sees all of the prompt
            types = 1 - types
        more["token_type_ids"] = torch.from_numpy(types[None])
    output = run(
        inputs_embeds=embeds,
        attention_mask=torch.ones((1, seen + count), dtype=torch.int64),
        position_ids=torch.from_numpy(graph_positions(positions)),
        past_key_values=cache,
        use_cache=True,
        **more,
    )
    logits = model.get_output_embeddings()(output.last_hidden_state[:, -1])[0].float()
    cap = getattr(language.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class TransformersDecoder:
    """A ``Decoder`` over a model of transformers, whose language half and head are used."""

    name = "transformers"
    device = None
    capacity = None

    def __init__(self, model: Any, info: DecoderInfo) -> None:
        self.model, self.info = model, info

    def start(self) -> TransformersState:
        """A state without rows."""
        return TransformersState(self)

    def close(self) -> None:
        """See ``Decoder.close``."""
        self.model = None


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

    def append(
        self,
        embeds: Rows,
        positions: np.ndarray,
        deepstack: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """See ``DecoderState.append``."""
        import torch

        decoder = self._decoder
        check_rows(embeds, positions, decoder.info, deepstack, groups)
        rows = torch.tensor(host_rows(embeds)[None], dtype=torch.float32)
        with torch.inference_mode():
            logits = language_logits(decoder.model, rows, positions, self._cache, deepstack, groups)
        return check_logits(logits.numpy())

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
