"""``manifest.json``: what a bundle holds, as dataclasses with a checked JSON round trip.

Reading is strict: a field that is missing, of the wrong type or unknown is refused by its name, and so is a schema
that this version does not know. Additions to the format raise ``SCHEMA``; older bundles stay readable, as every
addition has a default.

Schema 2 added ``decoder.engine``, ``decoder.engine_refused``, ``vision.quantisation`` and ``calibration``. Schema 3
added ``decoder.position_axes``, ``decoder.deepstack``, ``decoder.mask``, ``processor.placeholder``,
``processor.picture``, the budget ``prompt``, ``vision.tiles.pictures``, ``vision.tiles.extras`` and
``vision.deepstack``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.tiling import TilesInfo

SCHEMA = 3

Positions = Literal["compact", "original"]
Mask = Literal["causal", "picture", "prefix"]


@dataclass(frozen=True)
class ModelInfo:
    """Where the weights came from. ``sha256`` is over the checkpoint's weight files, as the exporter computed it."""

    id: str
    family: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class SelectorInfo:
    """The scorer inside the vision graph; fields that a selector does not use are null."""

    name: str
    rank: int | None = None
    variance: float | None = None
    block: int | None = None
    iterations: int | None = None
    centre: bool = False
    start: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class BlockSensitivity:
    """What quantising one block alone changed: see ``QuantisationInfo`` for the measures."""

    block: str
    cosine: float
    overlap: float
    scores: float


@dataclass(frozen=True)
class QuantisationInfo:
    """How a vision graph was quantised, and what that changed against the same graph in ``float_type``.

    ``ranges`` is the rule by which activations' ranges were set from ``calibrated_on`` pictures of ``source``.
    ``float_blocks``, of ``blocks``, were left in ``float_type``; ``sensitivity`` is what each block did alone, worst
    first, on ``swept_on`` other pictures, empty where it was not asked for. ``target_met`` tells whether those pictures
    came within the wanted overlap and cosine; null where the blocks were not chosen by them.

    The rest is of the whole graph, on ``pictures`` more: ``cosine`` of the encoder's tokens, ``overlap`` of the kept
    sets (and of the worst picture's), the share of ``scores`` that moved to other tokens, the share of ``questions``
    whose first answer token is the same (``agreement``), and the graph's size over that of the float one.
    """

    float_type: str
    ranges: str
    source: str
    calibrated_on: int
    swept_on: int
    pictures: int
    questions: int
    blocks: int
    float_blocks: list[str]
    target_met: bool | None
    cosine: float
    overlap: float
    worst_overlap: float
    scores: float
    agreement: float
    size_ratio: float
    sensitivity: list[BlockSensitivity] = field(default_factory=list)


@dataclass(frozen=True)
class VisionInfo:
    """The vision graph: pixels [B, height, width, 3] -> ``keep`` of ``tokens`` features of ``hidden`` channels.

    ``grid`` is [rows, columns] of the patches, ``channels`` the encoder's width, ``tap`` the hidden state used. Where
    a picture is cut into ``tiles``, these are of a tile, B counts the picture's tiles, and ``tokens`` is the most
    that one choice is made from; a picture that has fewer than ``keep`` keeps all. ``deepstack`` counts the levels of
    features of the kept tokens that the graph gives beside ``features``, for the decoder's first layers.
    """

    file: str
    input: Literal["uint8", "float32"]
    height: int
    width: int
    grid: list[int]
    tokens: int
    keep: int
    channels: int
    hidden: int
    tap: int
    precision: str
    opset: int
    selector: SelectorInfo
    quantisation: QuantisationInfo | None = None
    tiles: TilesInfo | None = None
    deepstack: int = 0


@dataclass(frozen=True)
class GenerationDefaults:
    """What is used when the caller does not say. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class DecoderEngineInfo:
    """The decoder graph that engines are built from: opset 24, a static KV cache of ``cache`` rows updated in place.

    It reads the same embedding table as the decoder of ``DecoderInfo.file``, which ONNX Runtime runs.
    """

    file: str
    precision: str
    opset: int
    cache: int


@dataclass(frozen=True)
class DecoderInfo:
    """The decoder graph. ``context`` is the most positions it was made for; ``eos`` the ids that end an answer.

    ``kv_cache`` is ``shared`` where past and present may be one buffer of fixed length (GroupQueryAttention),
    ``growing`` where each step returns a longer cache. ``engine`` is the graph that engines are built from, where a
    release of the target's TensorRT has the operators. ``engine_refused`` says why there is none, or which releases
    cannot use it: there the vision engine is chained to ONNX Runtime's decoder.

    ``position_axes`` is 3 where a position is (time, row, column), as in M-RoPE. ``deepstack`` counts the levels of
    features that are added to the hidden states after the first layers, one a layer. ``mask`` tells which rows see
    later ones, too: none, those of one ``picture`` each other, or all of the prompt (its ``prefix``) each other.
    ``embed_scale`` is what the rows of the embedding table are multiplied by, in float32.
    """

    file: str
    embedding: str
    precision: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    eos: list[int]
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    kv_cache: Literal["growing", "shared"] = "growing"
    engine: DecoderEngineInfo | None = None
    engine_refused: str | None = None
    position_axes: int = 1
    deepstack: int = 0
    mask: Mask = "causal"
    embed_scale: float = 1.0


@dataclass(frozen=True)
class ProcessorInfo:
    """Files of the text and picture processors, and the special tokens the runtime must know.

    Where the chat template writes something else for a picture than the prompt holds, ``placeholder`` is what it
    writes, and ``picture`` takes its place before the text is tokenized; the image token is in ``picture`` once.
    """

    tokenizer: str
    chat_template: str
    image: str
    image_token_id: int
    image_token: str
    bos_token: str | None = None
    eos_token: str | None = None
    placeholder: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class GoldenInfo:
    """The case that ``verify`` replays."""

    image: str
    case: str
    arrays: str


@dataclass(frozen=True)
class CalibrationInfo:
    """Files that tell what the user's own pictures decided; null where there is none.

    ``record`` and ``arrays`` are the calibration that the export was given; ``start`` is the start block inside the
    vision graph, float32 [channels, block], for whoever builds the selector again; ``keep`` is the agreement against K
    by which the number of kept tokens was chosen.
    """

    record: str | None = None
    arrays: str | None = None
    start: str | None = None
    keep: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """SHA-256 in hex and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``. ``files`` lists every file of the bundle except the manifest itself."""

    model: ModelInfo
    vision: VisionInfo
    decoder: DecoderInfo
    processor: ProcessorInfo
    positions: Positions
    target: str
    golden: GoldenInfo
    calibration: CalibrationInfo | None = None
    written_by: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The manifest as indented JSON, schema first."""
        content = dataclasses.asdict(self)
        ordered = {"schema": content.pop("schema"), "written_by": content.pop("written_by"), **content}
        return json.dumps(ordered, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: not JSON, a schema this version does not read, a missing, unknown or mistyped field, or
                numbers that contradict each other. The sentence names the field.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json is not valid JSON ({error}): copy or export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError("manifest.json is not a JSON object: copy or export the bundle again")
        _check_schema(content.get("schema"))
        manifest = read_fields(Manifest, content, "manifest.json")
        check(manifest)
        return manifest


def check(manifest: Manifest) -> None:
    """Refuse numbers that cannot all be true.

    Raises:
        BundleError: naming the field and its value.
    """
    vision, decoder = manifest.vision, manifest.decoder
    for section, info, names in (
        ("vision", vision, ("height", "width", "tokens", "keep", "channels", "hidden")),
        ("decoder", decoder, ("layers", "kv_heads", "head_dim", "hidden", "vocab", "context")),
    ):
        for name in names:
            if getattr(info, name) < 1:
                raise BundleError(f"manifest.json: {section}.{name} is {getattr(info, name)}, it must be 1 or more")
    what, tokens = ("tiles.per_tile", vision.tiles.per_tile) if vision.tiles else ("tokens", vision.tokens)
    if len(vision.grid) != 2 or min(vision.grid) < 1 or vision.grid[0] * vision.grid[1] != tokens:
        raise BundleError(f"manifest.json: vision.grid {vision.grid} does not make vision.{what} {tokens}")
    if vision.tiles is not None:
        _check_tiles(vision.tiles, vision.tokens)
    if vision.keep > vision.tokens:
        raise BundleError(f"manifest.json: vision.keep {vision.keep} is more than vision.tokens {vision.tokens}")
    if vision.hidden != decoder.hidden:
        raise BundleError(f"manifest.json: vision.hidden {vision.hidden} is not decoder.hidden {decoder.hidden}")
    if decoder.position_axes not in (1, 3):
        raise BundleError(f"manifest.json: decoder.position_axes is {decoder.position_axes}, it must be 1 or 3")
    if vision.deepstack != decoder.deepstack:
        raise BundleError(
            f"manifest.json: vision.deepstack {vision.deepstack} is not decoder.deepstack {decoder.deepstack}"
        )
    if not 0 <= decoder.deepstack <= decoder.layers:
        raise BundleError(f"manifest.json: decoder.deepstack is {decoder.deepstack}, the layers are {decoder.layers}")
    for where, token in (("processor.image_token_id", manifest.processor.image_token_id),
                         *(("decoder.eos", token) for token in decoder.eos)):  # fmt: skip
        if token < 0:
            raise BundleError(f"manifest.json: {where} holds {token}, a token id is 0 or more")


def _check_tiles(tiles: TilesInfo, tokens: int) -> None:
    limits = [tiles.least, tiles.likely, tiles.most]
    if limits != sorted(limits) or tiles.least < 1:
        raise BundleError(
            f"manifest.json: vision.tiles has {limits} tiles, least, likely and most must be 1 or more and rise"
        )
    if tiles.sources < 1:
        raise BundleError(f"manifest.json: vision.tiles.sources is {tiles.sources}, it must be 1 or more")
    if tiles.pictures < 1 or (tiles.pictures > 1 and tiles.budget != "prompt"):
        raise BundleError(
            f"manifest.json: vision.tiles.pictures is {tiles.pictures}, it must be 1, or more with the budget `prompt`"
        )
    if tiles.budget == "tile" and tokens != tiles.per_tile:
        raise BundleError(f"manifest.json: vision.tokens {tokens} is not vision.tiles.per_tile {tiles.per_tile}")


def _check_schema(schema: object) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise BundleError('manifest.json: the field "schema" is missing or not a whole number: is this a bundle?')
    if schema > SCHEMA:
        raise BundleError(
            f"the bundle was made by a newer svdprune (schema {schema}, this one reads {SCHEMA}): upgrade svdprune"
        )
    if schema < 1:
        raise BundleError(f"manifest.json: schema {schema} was never written by svdprune: export the bundle again")
