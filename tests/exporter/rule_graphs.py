"""Small graphs, each about one rule of ``svdprune.runtime.traps``, in ONNX's own text form.

``BREAKS`` holds graphs that break the rule they are listed under, ``KEEPS`` graphs that break none where the opset and
the operators exist. ``RTX`` says what TensorRT-RTX 1.7 does with a graph that the rules refuse for the newest release.
"""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import TensorProto, helper


def model(text: str, opset: int = 18, domains: str = "") -> onnx.ModelProto:
    """A model of one graph; ``domains`` are further imports, `"com.microsoft": 1`."""
    imports = f'"": {opset}' + (f", {domains}" if domains else "")
    return onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]>\ng {text}")


def _constant_model(**attribute: object) -> onnx.ModelProto:
    """A model whose only node is a Constant of an odd kind."""
    node = helper.make_node("Constant", [], ["y"], **attribute)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    return helper.make_model(helper.make_graph([node], "g", [], [out]), opset_imports=[helper.make_opsetid("", 18)])


_SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [1]), [2]
)
_QKV = "float16[1,2,8,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v"
_QKV3 = "float16[1,8,128] q, float16[1,8,128] k, float16[1,8,128] v"
_CACHE = "float16[1,2,8,64] c, float16[1,2,1,64] u, int64[1] w"
_ROPE = "float16[1,2,8,64] x, float16[16,32] c, float16[16,32] s"
_SQUARE = "float[4,4] x, int64[4,4] i"

BREAKS: dict[str, dict[str, onnx.ModelProto]] = {
    "factorisation": {
        "Det": model("(float[3,3] x) => (float y) { y = Det(x) }"),
        "a custom QR": model("(float[3,3] x) => (float[3,3] y) { y = my.QR(x) }", 18, '"my": 1'),
    },
    "data-dependent": {
        "Compress": model("(float[4] x, bool[4] c) => (float[N] y) { y = Compress<axis=0>(x, c) }"),
        "Unique": model("(float[4] x) => (float[N] y) { y = Unique(x) }"),
    },
    "data-dependent-rtx": {"NonZero": model("(float[2,4] x) => (int64[2,N] y) { y = NonZero(x) }")},
    "integer-operators": {
        "MatMulInteger": model("(int8[2,4] x, int8[4,2] w) => (int32[2,2] y) { y = MatMulInteger(x, w) }"),
        "DynamicQuantizeLinear": model(
            "(float[2,4] x) => (uint8[2,4] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }"
        ),
    },
    "attention": {"Attention": model(f"({_QKV}) => (float16[1,2,8,64] y) {{ y = Attention(q, k, v) }}", 23)},
    "decoder-operators": {
        "RMSNormalization": model(
            "(float16[2,8] x, float16[8] s) => (float16[2,8] y) { y = RMSNormalization(x, s) }", 23
        ),
        "TensorScatter": model(f"({_CACHE}) => (float16[1,2,8,64] y) {{ y = TensorScatter(c, u, w) }}", 24),
        "RotaryEmbedding": model(
            f"({_ROPE}, int64[1,8] p) => (float16[1,2,8,64] y) {{ y = RotaryEmbedding(x, c, s, p) }}", 23
        ),
    },
    "windows": {
        "HannWindow": model("(float[16] x) => (float[16] y) <int64 n={16}> { w = HannWindow(n) y = Mul(x, w) }")
    },
    "stft": {
        "STFT": model(
            "(float[1,64,1] x) => (float[1,7,9,2] y) <int64 s={8}, int64 n={16}> { y = STFT<onesided=1>(x, s, , n) }"
        )
    },
    "newer-operators": {"Swish": model("(float[2,4] x) => (float[2,4] y) { y = Swish(x) }", 24)},
    "dft-rtx": {"DFT": model("(float[1,8,1] x) => (float[1,8,2] y) { y = DFT<axis=1>(x) }")},
    "operator": {
        "BitwiseAnd": model("(int32[4] x, int32[4] z) => (int32[4] y) { y = BitwiseAnd(x, z) }"),
        "a sequence": model(
            "(float[2,4] x) => (float[4,4] y) { s = SequenceConstruct(x, x) y = ConcatFromSequence<axis=0>(s) }"
        ),
    },
    "domain": {
        "com.microsoft": model(
            "(float[2,4] x) => (float[2,4] y) { y = com.microsoft.QuickGelu(x) }", 18, '"com.microsoft": 1'
        ),
        "com.microsoft, a name of ONNX": model(
            "(float[2,4] x) => (float[2,4] y) { y = com.microsoft.Gelu(x) }", 18, '"com.microsoft": 1'
        ),
    },
    "opset": {
        "too old": model("(float[2] x) => (float[2] y) { y = Abs(x) }", 8),
        "too new": model("(float[2] x) => (float[2] y) { y = Abs(x) }", 26),
    },
    "rank": {
        "9 dimensions": model("(float[1,1,1,1,1,1,1,1,2] x) => (float[1,1,1,1,1,1,1,1,2] y) { y = Abs(x) }"),
    },
    "type": {
        "int16": model("(int16[2,4] x) => (float[2,4] y) { y = Cast<to=1>(x) }"),
        "uint32 within": model("(float[2,4] x) => (float[2,4] y) { t = Cast<to=12>(x) y = Cast<to=1>(t) }"),
    },
    "double": {"double": model("(double[2,4] x) => (double[2,4] y) { y = Add(x, x) }")},
    "uint8": {
        "Transpose of bytes": model(
            "(uint8[2,4,4,3] x) => (float[2,3,4,4] y) { t = Transpose<perm=[0,3,1,2]>(x) y = Cast<to=1>(t) }"
        ),
        "Identity of bytes": model("(uint8[2,4] x) => (float[2,4] y) { t = Identity(x) y = Cast<to=1>(t) }"),
        "sum of bytes": model("(uint8[2,4] x) => (uint8[2,4] y) { y = Add(x, x) }"),
        "bytes within": model("(float[2,4] x) => (float[2,4] y) { t = Cast<to=2>(x) y = Cast<to=1>(t) }"),
        "bytes to integers": model("(uint8[2,4] x) => (int32[2,4] y) { y = Cast<to=6>(x) }"),
    },
    "topk-constant": {
        "K is an input": model("(float[2,64] x, int64[1] k) => (float[2,N] y) { y, i = TopK<axis=1>(x, k) }"),
    },
    "topk-limit": {
        "K is 3841": model("(float[2,4096] x) => (float[2,3841] y) <int64[1] k={3841}> { y, i = TopK<axis=1>(x, k) }"),
        "K is 4000 from a Constant": model(
            "(float[2,4096] x) => (float[2,4000] y) { k = Constant<value_ints=[4000]>() y, i = TopK<axis=1>(x, k) }"
        ),
    },
    "topk-sorted": {
        "not sorted": model(
            "(float[2,64] x) => (float[2,8] y) <int64[1] k={8}> { y, i = TopK<axis=1, sorted=0>(x, k) }"
        )
    },
    "resize": {
        "antialias": model(
            "(float[1,1,8,8] x) => (float[1,1,4,4] y) <float[4] s={1.0,1.0,0.5,0.5}> "
            '{ y = Resize<mode="linear", antialias=1>(x, , s) }'
        ),
        "crop": model(
            "(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[8] r={0.0,0.0,0.0,0.0,1.0,1.0,1.0,1.0}, "
            'float[4] s={1.0,1.0,2.0,2.0}> { y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, r, s) }'
        ),
        "aspect ratio": model(
            "(float[1,1,4,4] x) => (float[1,1,8,8] y) <int64[4] s={1,1,8,8}> "
            '{ y = Resize<mode="linear", keep_aspect_ratio_policy="not_larger">(x, , , s) }'
        ),
    },
    "scatter-reduction": {
        "ScatterND": model(
            '(float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { y = ScatterND<reduction="add">(x, i, u) }', 16
        ),
        "ScatterElements": model(
            f'({_SQUARE}, float[4,4] u) => (float[4,4] y) {{ y = ScatterElements<axis=1, reduction="add">(x, i, u) }}'
        ),
    },
    "scatternd-opset": {
        "opset 18": model("(float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { y = ScatterND(x, i, u) }")
    },
    "einsum": {
        "ellipsis": model(
            '(float[2,3,4] x, float[2,4,5] z) => (float[2,3,5] y) { y = Einsum<equation="...ij,...jk->...ik">(x, z) }'
        ),
        "diagonal": model('(float[4,4] x) => (float[4] y) { y = Einsum<equation="ii->i">(x) }'),
        "broadcast": model(
            '(float[1,4] x, float[3,4] z) => (float[3,4] y) { y = Einsum<equation="ij, ij->ij">(x, z) }'
        ),
    },
    "einsum-letters": {
        "capitals": model('(float[2,4] x, float[2,4] z) => (float[2,2] y) { y = Einsum<equation="Ij,Kj->IK">(x, z) }')
    },
    "pow-base": {"integers": model("(int32[2,4] x) => (int32[2,4] y) <int32 e={2}> { y = Pow(x, e) }")},
    "pow-exponent": {"integer exponent": model("(float[2,4] x) => (float[2,4] y) <int64 e={2}> { y = Pow(x, e) }")},
    "reduce-axes": {
        "an input": model("(float[2,4] x, int64[1] a) => (float[2,1] y) { y = ReduceMean<keepdims=1>(x, a) }"),
        "computed": model(
            "(float[2,4] x, float[1] z) => (float[2,1] y) { a = Cast<to=7>(z) y = ReduceSum<keepdims=1>(x, a) }"
        ),
    },
    "squeeze-initialiser": {
        "computed": model("(float[2,1] x) => (float[2] y) <int64[1] a={1}> { b = Identity(a) y = Squeeze(x, b) }"),
    },
    "squeeze-axes": {
        "an input": model("(float[2,1] x, int64[1] a) => (float[2] y) { y = Squeeze(x, a) }"),
    },
    "pad-axes": {
        "axes": model(
            "(float[2,4] x) => (float[2,6] y) <int64[2] p={1,1}, float c={0.0}, int64[1] a={1}> { y = Pad(x, p, c, a) }"
        )
    },
    "constant-input": {
        "CumSum": model("(float[2,4] x, int64 a) => (float[2,4] y) { y = CumSum(x, a) }"),
        "OneHot": model("(int64[4] x, int64 d) => (float[4,N] y) <float[2] v={0.0,1.0}> { y = OneHot(x, d, v) }"),
    },
    "eyelike": {"a free size": model("(float[N,4] x) => (float[N,4] y) { y = EyeLike(x) }")},
    "outputs": {
        "LayerNormalization": model(
            "(float[2,4] x, float[4] s) => (float[2,4] y, float[2,1] m) { y, m = LayerNormalization(x, s) }"
        ),
        "MaxPool": model(
            "(float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] m) "
            "{ y, m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) }"
        ),
    },
    "training": {
        "Dropout": model("(float[2,4] x) => (float[2,4] y) <float r={0.5}, bool t={1}> { y = Dropout(x, r, t) }"),
        "BatchNormalization": model(
            "(float[2,3,4,4] x, float[3] s) => (float[2,3,4,4] y) "
            "{ y, a, b = BatchNormalization<training_mode=1>(x, s, s, s, s) }"
        ),
    },
    "dilations": {
        "AveragePool": model(
            "(float[1,1,8,8] x) => (float[1,1,6,6] y) { y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x) }", 19
        )
    },
    "constant-kind": {
        "sparse": _constant_model(sparse_value=_SPARSE),
        "text": model('(float[2] x) => (float[2] y) { s = Constant<value_string="a">() y = Abs(x) }'),
    },
    "attention-form": {
        "past": model(
            f"({_QKV}, float16[1,2,4,64] p, float16[1,2,4,64] r) => (float16[1,2,8,64] y, float16[1,2,12,64] pk, "
            "float16[1,2,12,64] pv) { y, pk, pv = Attention(q, k, v, , p, r) }",
            24,
        ),
        "softcap": model(f"({_QKV}) => (float16[1,2,8,64] y) {{ y = Attention<softcap=9.0>(q, k, v) }}", 24),
        "lengths": model(f"({_QKV}, int64[1] n) => (float16[1,2,8,64] y) {{ y = Attention(q, k, v, , , , n) }}", 24),
        "3 dimensions": model(
            f"({_QKV3}) => (float16[1,8,128] y) {{ y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) }}", 24
        ),
    },
    "tensorscatter-form": {
        "3 dimensions": model(
            "(float16[1,8,64] c, float16[1,1,64] u, int64[1] w) => (float16[1,8,64] y) { y = TensorScatter(c, u, w) }",
            24,
        ),
        "another axis": model(
            "(float16[1,2,8,64] c, float16[1,1,8,64] u, int64[1] w) => (float16[1,2,8,64] y) "
            "{ y = TensorScatter<axis=1>(c, u, w) }",
            24,
        ),
    },
    "rotary-positions": {
        "int32": model(f"({_ROPE}, int32[1,8] p) => (float16[1,2,8,64] y) {{ y = RotaryEmbedding(x, c, s, p) }}", 23),
    },
    "qdq-zero": {
        "int8": model(
            "(float[2,4] x) => (float[2,4] y) <float s={0.5}, int8 z={3}> "
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
        ),
        "computed": model(
            "(float[2,4] x, int8 z) => (float[2,4] y) <float s={0.5}> "
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
        ),
    },
    "qdq-type": {
        "int32 bias": model(
            "(float[4] x) => (float[4] y) <int32[4] q={1,2,3,4}, float s={0.5}> "
            "{ b = DequantizeLinear(q, s) y = Add(x, b) }"
        ),
        "16 bits": model(
            "(float[2,4] x) => (float[2,4] y) <float s={0.5}, uint16 z={0}> "
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
            21,
        ),
    },
    "qdq-uint8": {
        "zero at 0": model(
            "(float[2,4] x) => (float[2,4] y) <float s={0.5}, uint8 z={0}> "
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
        )
    },
}

KEEPS: dict[str, onnx.ModelProto] = {
    "bytes cast at once": model(
        "(uint8[2,4,4,3] x) => (float[2,3,4,4] y) { t = Cast<to=1>(x) y = Transpose<perm=[0,3,1,2]>(t) }"
    ),
    "bytes to half": model("(uint8[2,4] x) => (float16[2,4] y) { y = Cast<to=10>(x) }"),
    "bytes out": model("(float[2,4] x) => (uint8[2,4] y) { y = Cast<to=2>(x) }"),
    "TopK of 3840": model("(float[2,4096] x) => (float[2,3840] y) <int64[1] k={3840}> { y, i = TopK<axis=1>(x, k) }"),
    "TopK of int64": model("(int64[2,64] x) => (int64[2,8] y) <int64[1] k={8}> { y, i = TopK<axis=1>(x, k) }"),
    "TopK of one dimension": model("(float[64] x) => (float[8] y) <int64[1] k={8}> { y, i = TopK<axis=0>(x, k) }"),
    "8 dimensions": model("(float[1,1,1,1,1,1,1,2] x) => (float[1,1,1,1,1,1,1,2] y) { y = Abs(x) }"),
    "GatherND in a batch": model(
        "(float[2,8,4] x, int64[2,3,1] i) => (float[2,3,4] y) { y = GatherND<batch_dims=1>(x, i) }"
    ),
    "ScatterND at opset 17": model(
        "(float[4] x, int64[2,1] i, float[2] u) => (float[4] y) { y = ScatterND(x, i, u) }", 17
    ),
    "Einsum": model(
        '(float[2,3,4] x, float[2,4,5] z) => (float[2,3,5] y) { y = Einsum<equation="bij,bjk->bik">(x, z) }'
    ),
    "Pow of floats": model("(float[2,4] x) => (float[2,4] y) <float e={2.0}> { y = Pow(x, e) }"),
    "Reduce": model("(float[2,4] x) => (float[2,1] y) <int64[1] a={1}> { y = ReduceSum<keepdims=1>(x, a) }"),
    "Reduce by a Constant": model(
        "(float[2,4] x) => (float[2,1] y) { a = Constant<value_ints=[1]>() y = ReduceSum<keepdims=1>(x, a) }"
    ),
    "Resize": model(
        '(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] s={1.0,1.0,2.0,2.0}> { y = Resize<mode="cubic">(x, , s) }'
    ),
    "LayerNormalization": model("(float[2,4] x, float[4] s) => (float[2,4] y) { y = LayerNormalization(x, s) }"),
    "Dropout asleep": model("(float[2,4] x) => (float[2,4] y) { y = Dropout(x) }"),
    "symmetric Q/DQ": model(
        "(float[2,4] x) => (float[2,4] y) <float s={0.5}, int8 z={0}> "
        "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    ),
    "If": model(
        "(bool c, float[2,4] x) => (float[2,4] y) { y = If(c) <then_branch = t () => (float[2,4] a) { a = Abs(x) }, "
        "else_branch = e () => (float[2,4] b) { b = Neg(x) }> }"
    ),
    "Loop": model(
        "(float[2,4] x) => (float[2,4] y) <int64 n={3}, bool c={1}> { y = Loop(n, c, x) "
        "<body = b (int64 i, bool ci, float[2,4] a) => (bool co, float[2,4] o) { co = Identity(ci) o = Abs(a) }> }"
    ),
}

# What the parser takes although a rule refuses it for TensorRT 11.4: where the rule says more, and why.
STRICTER: dict[tuple[str, str], str] = {
    ("stft", "STFT"): "refused by older releases only",
    ("domain", "com.microsoft, a name of ONNX"): "the parser goes by the name alone and takes ONNX's meaning",
    ("opset", "too old"): "read as far as possible, not promised",
    ("opset", "too new"): "read as far as possible, not promised",
    ("double", "double"): "taken, and computed in float",
    ("uint8", "bytes to integers"): "the API's documentation grants conversions to floats only",
    ("topk-sorted", "not sorted"): "docs/operators.md says that sorted must be 1",
    ("rotary-positions", "int32"): "docs/operators.md asks for int64",
    ("attention-form", "lengths"): "docs/operators.md lists nonpad_kv_seqlen as unsupported",
    ("attention-form", "3 dimensions"): "docs/operators.md asks for four",
}
