"""The memory that a bundle takes on a machine: weights, KV cache, activations, and the peak of an engine's build."""

from __future__ import annotations

from dataclasses import dataclass

from svdprune.exporter.estimate.costs import Format
from svdprune.exporter.estimate.shapes import Model
from svdprune.runtime.engines.preflight import BUILD_BASE, BUILD_FACTOR
from svdprune.runtime.roofline import Machine

GIB = 2**30

# What is not ours to use. On a board whose CPU and GPU share the memory: the system (a Jetson without a desktop idles
# at a little above 1 GB) and what CUDA, TensorRT and the process take beside weights and cache (1.3 to 1.5 GB by
# published peaks, docs/estimate.md). On a card: the latter alone.
RESERVE_SHARED = 5 * GIB // 2
RESERVE_CARD = 3 * GIB // 2
TABLE_BYTES = 2  # the embedding table is stored in float16


@dataclass(frozen=True)
class Memory:
    """Bytes, rounded up to whole ones.

    vision_weights, decoder_weights: of the two engines; embedding: the token table beside them.
    cache: keys and values of `cache_rows` rows a sequence. vision_work, decoder_work: activations at their peak.
    build: what building the larger engine takes at its peak, one engine at a time. On a card that is the card's memory;
        on a shared one the builder's copies of the weights come to it.
    reserve: left to the system. capacity: of the machine, None where not known.
    """

    vision_weights: int
    decoder_weights: int
    embedding: int
    cache: int
    cache_rows: int
    vision_work: int
    decoder_work: int
    build: int
    reserve: int
    capacity: int | None

    @property
    def vision_engine(self) -> int:
        """The vision engine, loaded."""
        return self.vision_weights + self.vision_work

    @property
    def decoder_engine(self) -> int:
        """The decoder engine, loaded, without the cache."""
        return self.decoder_weights + self.decoder_work

    @property
    def total(self) -> int:
        """What answering takes."""
        return self.vision_engine + self.decoder_engine + self.embedding + self.cache

    @property
    def free(self) -> int | None:
        """Capacity less the reserve."""
        return None if self.capacity is None else max(0, self.capacity - self.reserve)

    @property
    def fits(self) -> bool | None:
        """Whether answering fits; None where the capacity is not known."""
        return None if self.free is None else self.total <= self.free

    @property
    def build_fits(self) -> bool | None:
        """Whether building on the machine fits."""
        return None if self.free is None else self.build <= self.free


def memory_of(
    model: Model, keep: int, rows: int, cache_rows: int, batch: int, vision: Format, decoder: Format, on: Machine
) -> Memory:
    """Memory with K = `keep` vision tokens, a prompt of `rows` rows and a cache of `cache_rows` rows a sequence."""
    tower, text, connector = model.tower, model.text, model.connector
    tokens = batch * model.crops * tower.sequence
    inner = tower.mlp * (2 if tower.gated else 1)
    # The residual stream, its normed copy, and the larger of the MLP's inside and queries, keys and values.
    vision_work = tokens * (2 * tower.dim + max(inner, 3 * tower.dim)) * vision.activation_bytes
    if keep < model.tokens:  # the scorer's float32 copy, scaled copy and transpose come after the last layer
        scorer = 3 * batch * model.tokens * model.selected_channels * 4
        vision_work = max(vision_work, scorer + tokens * tower.dim * vision.activation_bytes)
    widest = max(2 * text.intermediate, (text.heads + 2 * text.kv_heads) * text.head_dim)
    decoder_work = batch * (rows * (2 * text.hidden + widest) * decoder.activation_bytes + 4 * text.vocab)
    decoder_bits = (text.layer_parameters + text.norm_parameters) * decoder.bits + text.table * decoder.head_bits
    vision_weights = round((tower.parameters + connector.parameters) * vision.bits / 8)
    decoder_weights = round(decoder_bits / 8)
    builds = [(vision_weights, vision_work), (decoder_weights, decoder_work)]
    copies = [BUILD_BASE + round(BUILD_FACTOR * weights) if on.shared else 0 for weights, _ in builds]
    return Memory(
        vision_weights=vision_weights,
        decoder_weights=decoder_weights,
        embedding=text.table * TABLE_BYTES,
        cache=batch * cache_rows * text.cache_row * decoder.activation_bytes,
        cache_rows=cache_rows,
        vision_work=vision_work,
        decoder_work=decoder_work,
        build=max(weights + work + copy for (weights, work), copy in zip(builds, copies, strict=True)),
        reserve=RESERVE_SHARED if on.shared else RESERVE_CARD if on.memory is not None else 0,
        capacity=on.memory,
    )
