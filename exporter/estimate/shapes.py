"""The sizes that an estimate needs of a model, and how many parameters they make. No model is named here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A matrix product with weights: `inputs` to `outputs`."""

    inputs: int
    outputs: int
    bias: bool = True

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Tower:
    """A vision transformer on one crop of a picture.

    Attributes:
        height, width: of the crop, pixels; patch: pixels of a patch's side; channels, frames: of the input.
        dim, mlp, heads: D, the inner width of the MLP, attention heads.
        layers: of the checkpoint; run: those that the exported graph keeps, up to the tap.
        prefix: tokens before the patches ([CLS]).
        taken: tokens of a crop that are features (patches, less or plus the prefix).
        windowed: of the layers run, how many attend within windows of `window` tokens only.
        gated: whether the MLP has a gate beside its first product.
        norm: parameters of one norm in units of D (2 for LayerNorm, 1 for RMSNorm).
        fixed: parameters outside layers: patch embedding, positions, [CLS], norms before and after.
        layer_extra: further parameters of a layer (layer scale, query and key norms).
    """

    height: int
    width: int
    patch: int
    channels: int
    frames: int
    dim: int
    mlp: int
    heads: int
    layers: int
    run: int
    prefix: int
    taken: int
    fixed: int
    gated: bool = False
    qkv_bias: bool = True
    mlp_bias: bool = True
    norm: int = 2
    layer_extra: int = 0
    windowed: int = 0
    window: int = 0

    @property
    def patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def sequence(self) -> int:
        """N, tokens that run through the layers."""
        return self.patches + self.prefix

    @property
    def linears(self) -> tuple[tuple[str, Linear], ...]:
        """The matrix products of one layer, by name."""
        inner = Linear(self.dim, self.mlp, self.mlp_bias)
        return (
            ("query, key, value", Linear(self.dim, 3 * self.dim, self.qkv_bias)),
            ("attention output", Linear(self.dim, self.dim)),
            *((("mlp gate", inner),) if self.gated else ()),
            ("mlp in", inner),
            ("mlp out", Linear(self.mlp, self.dim, self.mlp_bias)),
        )

    @property
    def parameters(self) -> int:
        """Of the layers run and all that is outside layers."""
        layer = sum(linear.parameters for _, linear in self.linears) + 2 * self.norm * self.dim + self.layer_extra
        return self.run * layer + self.fixed


@dataclass(frozen=True)
class Connector:
    """What stands between the tower and the language model.

    Attributes:
        merge: features joined into one row before the products (the square of a pixel shuffle's ratio); 1 for none.
        linears: one copy's products, in order; `copies`: how many such connectors run (DeepStack has one a level more).
        norms: parameters of its norms, all copies.
        selects_first: whether K tokens are chosen before it (rows K) or after it (rows T).
    """

    merge: int
    linears: tuple[Linear, ...]
    selects_first: bool
    copies: int = 1
    norms: int = 0

    @property
    def parameters(self) -> int:
        return self.copies * sum(linear.parameters for linear in self.linears) + self.norms


@dataclass(frozen=True)
class Text:
    """A decoder-only language model.

    `window` is the number of rows that attention looks back, None for all. `layer_extra`: parameters of the norms of
    queries and keys, a layer.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    layer_extra: int = 0
    window: int | None = None

    @property
    def linears(self) -> tuple[tuple[str, Linear], ...]:
        """The matrix products of one layer, by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("query, key, value", Linear(self.hidden, queries + 2 * keys, self.qkv_bias)),
            ("attention output", Linear(queries, self.hidden, self.output_bias)),
            ("mlp gate and in", Linear(self.hidden, 2 * self.intermediate, self.mlp_bias)),
            ("mlp out", Linear(self.intermediate, self.hidden, self.mlp_bias)),
        )

    @property
    def table(self) -> int:
        """Parameters of the embedding table, and of the output projection."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of the matrix products of all layers."""
        return self.layers * sum(linear.parameters for _, linear in self.linears)

    @property
    def norm_parameters(self) -> int:
        return self.layers * (2 * self.hidden + self.layer_extra) + self.hidden

    @property
    def parameters(self) -> int:
        """As a checkpoint counts them: a tied output projection is the embedding table."""
        return self.layer_parameters + self.norm_parameters + self.table * (1 if self.tied else 2)

    @property
    def cache_row(self) -> int:
        """Numbers that one token adds to the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Model:
    """A vision-language model as an estimate sees it.

    `crops` is how many crops the picture is cut into; `notes` say what was assumed, a sentence each.
    """

    name: str
    tower: Tower
    connector: Connector
    text: Text
    crops: int = 1
    notes: tuple[str, ...] = ()

    @property
    def features(self) -> int:
        """Features of the tower, all crops."""
        return self.crops * self.tower.taken

    @property
    def tokens(self) -> int:
        """T, the vision tokens that the language model gets without pruning."""
        return self.features // self.connector.merge

    @property
    def selected_channels(self) -> int:
        """D of the rows among which the selection chooses."""
        return self.tower.dim if self.connector.selects_first else self.text.hidden

    @property
    def vision_parameters(self) -> int:
        """Of the exported vision graph."""
        return self.tower.parameters + self.connector.parameters
