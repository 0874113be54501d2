"""What TensorRT's ONNX parser does not take, release by release: data only, one row a rule.

The predicates that look for these things in a graph are in ``svdprune.exporter.rules``, under the same names; the rows
live here so that a device, which has no onnx, can print them too. ``docs/targets.md`` shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass

Version = tuple[int, int]
"""Major and minor version of TensorRT."""

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
OLDEST: Version = (10, 3)  # the table knows nothing of what came before
OLDEST_OPSET = 9  # what every release reads (TensorRT's ONNX opset guide)

# Where a row comes from.
MATRIX = "onnx-tensorrt, docs/operators.md of 9.2, 10.15 and 11.2"
CHANGES = "onnx-tensorrt, docs/Changelog.md"
PARSER = "TensorRT-RTX 1.7's parser (tests/exporter/test_rules_parser.py)"
GUIDE = "TensorRT's support matrices and ONNX opset guide"


@dataclass(frozen=True)
class Trap:
    """One thing that some releases refuse, or read in another sense than ONNX.

    Attributes:
        name: short name, also that of the predicate.
        sentence: what is refused.
        remedy: what to do instead; a command-line option where one avoids it.
        source: where this is known from.
        first: first release it holds for; ``OLDEST`` means "and before".
        last: last release it holds for; None when it still does.
        operators: ONNX operators that it is about; a row without a predicate refuses them outright.
        rtx_only: only TensorRT-RTX refuses it.
    """

    name: str
    sentence: str
    remedy: str
    source: str
    first: Version = OLDEST
    last: Version | None = None
    operators: tuple[str, ...] = ()
    rtx_only: bool = False

    def holds(self, version: Version, runtime: str = TENSORRT) -> bool:
        """Whether the release refuses it. TensorRT-RTX is asked with the newest TensorRT's version."""
        if self.rtx_only and runtime != TENSORRT_RTX:
            return False
        return self.first <= version and (self.last is None or version <= self.last)


_ONNXRUNTIME_DECODER = "run the language model by ONNX Runtime (--decoder-backend onnxruntime)"
_SELECTOR = "select by TopK and Gather, as svdprune's own selectors do (--select leverage)"
_WAIT = "write it in older operators"

TRAPS = (
    # ---- operators -------------------------------------------------------------------------------------------------
    Trap(
        "factorisation",
        "Matrix factorisations are not imported.",
        "write it in matrix products, as the leverage selector does (--select leverage)",
        MATRIX,
        operators=("Det", "QR", "SVD", "Inverse", "Cholesky", "Eigh"),
    ),
    Trap(
        "data-dependent",
        "Operators whose result has no size known beforehand are not imported.",
        _SELECTOR,
        MATRIX,
        operators=("Compress", "Unique"),
    ),
    Trap(
        "data-dependent-rtx",
        "TensorRT-RTX has no plugins, and with them no NonZero or NonMaxSuppression.",
        _SELECTOR,
        PARSER,
        operators=("NonZero", "NonMaxSuppression"),
        rtx_only=True,
    ),
    Trap(
        "integer-operators",
        "Integer matrix products and convolutions are not imported.",
        "quantise with symmetric int8 Q/DQ pairs, or not at all (--precision fp16)",
        MATRIX,
        operators=("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"),
    ),
    Trap(
        "attention",
        "There is no Attention operator yet.",
        _ONNXRUNTIME_DECODER,
        CHANGES,
        last=(10, 13),
        operators=("Attention",),
    ),
    Trap(
        "decoder-operators",
        "There is no RotaryEmbedding, RMSNormalization or TensorScatter operator yet.",
        _ONNXRUNTIME_DECODER,
        CHANGES,
        last=(10, 14),
        operators=("RotaryEmbedding", "RMSNormalization", "TensorScatter"),
    ),
    Trap(
        "windows",
        "There are no window functions yet.",
        "put the window in as an initialiser",
        CHANGES,
        last=(10, 3),
        operators=("BlackmanWindow", "HammingWindow", "HannWindow"),
    ),
    Trap("stft", "There is no STFT operator yet.", _WAIT, CHANGES, last=(10, 4), operators=("STFT",)),
    Trap("newer-operators", "There is no DFT or Swish yet.", _WAIT, MATRIX, last=(11, 1), operators=("DFT", "Swish")),
    Trap("dft-rtx", "TensorRT-RTX has no DFT.", _WAIT, PARSER, operators=("DFT",), rtx_only=True),
    Trap("operator", "An operator outside the parser's table is not imported.", _WAIT, MATRIX),
    Trap(
        "domain",
        "Operators of another domain than ONNX's own need a plugin; without one they are refused or taken by name.",
        f"write it in ONNX's operators, or {_ONNXRUNTIME_DECODER}",
        PARSER,
    ),
    # ---- the graph as a whole --------------------------------------------------------------------------------------
    Trap("opset", "The opset must lie within what the release reads.", "export at opset 18", GUIDE),
    Trap("rank", "A tensor has at most 8 dimensions.", "merge dimensions with Reshape", PARSER),
    # ---- types -----------------------------------------------------------------------------------------------------
    Trap(
        "type",
        "int16, uint16, uint32, uint64, complex and string tensors are refused.",
        "use int32, int64 or a float",
        PARSER,
    ),
    Trap("double", "Double becomes float without a word.", "export float32 or float16 (--precision fp32)", MATRIX),
    Trap(
        "uint8",
        "uint8 is for inputs and outputs of the network only: the one thing done to it is a Cast from or to a float.",
        "put the Cast first, or take floats (--input float32)",
        MATRIX,
    ),
    # ---- single operators ------------------------------------------------------------------------------------------
    Trap(
        "topk-constant",
        "K of TopK must be a constant: as an input it would need a profile of values.",
        "fix the count of tokens (--keep 32)",
        PARSER,
        operators=("TopK",),
    ),
    Trap(
        "topk-limit",
        "TopK takes at most 3840 elements.",
        "keep fewer tokens (--keep 3840)",
        MATRIX,
        operators=("TopK",),
    ),
    Trap("topk-sorted", "TopK needs sorted=1.", "set sorted to 1", MATRIX, operators=("TopK",)),
    Trap(
        "resize",
        "Resize takes no antialias, no aspect ratio policy but stretch, and not the mode tf_crop_and_resize.",
        "resize the picture before the graph",
        MATRIX,
        operators=("Resize",),
    ),
    Trap(
        "scatter-reduction",
        "Scatter with a reduction is refused.",
        "gather instead, or compare indices with Equal and sum by MatMul",
        MATRIX,
        operators=("ScatterND", "ScatterElements"),
    ),
    Trap(
        "scatternd-opset",
        "ScatterND of opset 18 and later is read wrongly.",
        "use Where with a mask, or ScatterND at opset 17",
        CHANGES,
        last=(10, 8),
        operators=("ScatterND",),
    ),
    Trap(
        "einsum",
        "Einsum takes no ellipsis, no repeated index (a diagonal) and no broadcasting.",
        "write MatMul and Transpose",
        CHANGES,
        last=(10, 11),
        operators=("Einsum",),
    ),
    Trap("einsum-letters", "Indices of Einsum are lower-case letters.", "rename them", PARSER, operators=("Einsum",)),
    Trap("pow-base", "Pow of integers is refused.", "cast to float first", CHANGES, last=(10, 11), operators=("Pow",)),
    Trap(
        "pow-exponent",
        "Pow with an integer exponent is refused.",
        "give the exponent as a float",
        CHANGES,
        last=(10, 7),
        operators=("Pow",),
    ),
    Trap(
        "reduce-axes",
        "Axes of a reduction must be an initialiser.",
        "give the axes as an initialiser",
        MATRIX,
        operators=(
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
            *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
        ),
    ),
    Trap(
        "squeeze-initialiser",
        "Axes of Squeeze and Unsqueeze must be an initialiser.",
        "give the axes as an initialiser",
        CHANGES,
        last=(10, 6),
        operators=("Squeeze", "Unsqueeze"),
    ),
    Trap(
        "squeeze-axes",
        "Axes of Squeeze and Unsqueeze must follow from constants.",
        "give the axes as an initialiser",
        MATRIX,
        operators=("Squeeze", "Unsqueeze"),
    ),
    Trap(
        "pad-axes",
        "Pad takes no axes.",
        "pad every axis, by 0 where nothing is added",
        CHANGES,
        last=(10, 3),
        operators=("Pad",),
    ),
    Trap(
        "constant-input",
        "The axis of CumSum and the depth of OneHot must be constants.",
        "give them as initialisers",
        MATRIX,
        operators=("CumSum", "OneHot"),
    ),
    Trap(
        "eyelike", "EyeLike needs a fixed shape.", "put the matrix in as an initialiser", MATRIX, operators=("EyeLike",)
    ),
    Trap(
        "outputs",
        "Only the first output of these operators is there.",
        "compute the second one apart",
        MATRIX,
        operators=("LayerNormalization", "MaxPool"),
    ),
    Trap(
        "training",
        "Training modes are refused.",
        "export the model in evaluation mode",
        MATRIX,
        operators=("BatchNormalization", "Dropout"),
    ),
    Trap(
        "dilations",
        "Pooling takes no dilations.",
        "use Slice with steps before the pooling",
        MATRIX,
        operators=("AveragePool", "LpPool", "MaxPool"),
    ),
    Trap(
        "constant-kind",
        "Constants are dense numbers: no sparse value, no strings.",
        "write the value out",
        MATRIX,
        operators=("Constant",),
    ),
    Trap(
        "attention-form",
        "Attention takes Q, K, V and mask of four dimensions, and no past, softcap, lengths or second output.",
        "keep the cache with TensorScatter and mask with attn_mask",
        MATRIX,
        first=(10, 14),
        operators=("Attention",),
    ),
    Trap(
        "tensorscatter-form",
        "TensorScatter takes four dimensions and the axis -2.",
        "lay the cache out as (batch, heads, rows, head size)",
        MATRIX,
        first=(10, 15),
        operators=("TensorScatter",),
    ),
    Trap(
        "rotary-positions",
        "Position ids of RotaryEmbedding must be int64.",
        "cast them to int64",
        MATRIX,
        first=(10, 15),
        operators=("RotaryEmbedding",),
    ),
    # ---- quantisation ----------------------------------------------------------------------------------------------
    Trap(
        "qdq-zero",
        "Quantisation must be symmetric: the zero point is a constant 0.",
        "quantise symmetrically, or not at all (--precision fp16)",
        MATRIX,
        operators=("QuantizeLinear", "DequantizeLinear"),
    ),
    Trap(
        "qdq-type",
        "Quantised values are int8, uint8, int4, fp8 or fp4; an int32 bias or 16-bit codes are refused.",
        "leave biases in float and use int8",
        PARSER,
        operators=("QuantizeLinear", "DequantizeLinear"),
    ),
    Trap(
        "qdq-uint8",
        "Quantisation to uint8 is read wrongly.",
        "use int8",
        CHANGES,
        last=(10, 9),
        operators=("QuantizeLinear", "DequantizeLinear"),
    ),
)


def parse_version(text: str) -> Version:
    """(10, 3) of "10.3" or "10.3.0.26".

    Raises:
        ValueError: not a version of two numbers or more.
    """
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def traps_of(version: str, runtime: str = TENSORRT) -> tuple[Trap, ...]:
    """The rows that hold for a release ("10.3"), in the order of the table."""
    at = parse_version(version)
    return tuple(trap for trap in TRAPS if trap.holds(at, runtime))
