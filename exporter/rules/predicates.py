"""How each rule of ``runtime.traps`` is seen in a graph: a small predicate a rule, under the rule's name.

A predicate gives what is wrong in a few words, or None. What cannot be known (a type that inference does not give)
is not held against a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from svdprune.exporter.rules.operators import IMPORTED
from svdprune.exporter.rules.view import Site
from svdprune.runtime.traps import TRAPS

Predicate = Callable[[Site], str | None]
TOPK_LIMIT = 3840  # elements; TensorRT's own

PREDICATES: dict[str, Predicate] = {}

INTEGERS = (TensorProto.INT32, TensorProto.INT64)
QUANTISED = frozenset(
    getattr(TensorProto, name)
    for name in ("INT8", "UINT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
    if hasattr(TensorProto, name)  # an older onnx has no four-bit floats
)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_NAMED = frozenset(operator for trap in TRAPS for operator in trap.operators)


def predicate(name: str) -> Callable[[Predicate], Predicate]:
    """Decorator: this is how the rule ``name`` is seen."""

    def add(function: Predicate) -> Predicate:
        PREDICATES[name] = function
        return function

    return add


@predicate("operator")
def _operator(site: Site) -> str | None:
    known = site.node.domain not in ("", "ai.onnx") or site.op in IMPORTED or site.op in _NAMED
    return None if known else f"{site.op} is not imported"


@predicate("uint8")
def _uint8(site: Site) -> str | None:
    if site.op in ("QuantizeLinear", "DequantizeLinear", "Constant"):
        return None  # codes and zero points: the qdq rules
    if site.op == "Cast":
        given, made = site.type(0), site.attribute("to")
        if TensorProto.UINT8 not in (given, made):
            return None
        other = made if given == TensorProto.UINT8 else given
        if other is not None and other not in FLOATS:
            return f"it casts between uint8 and {TensorProto.DataType.Name(other).lower()}"
        if made == TensorProto.UINT8 and not _is_output(site):
            return "it makes uint8 within the graph"
        return None
    touched = [name for name in (*site.inputs, *site.outputs) if name and site.scope.type(name) == TensorProto.UINT8]
    return f"'{touched[0]}' is uint8" if touched else None


def _is_output(site: Site) -> bool:
    """Whether nothing in the graph reads what the node makes."""
    return not any(site.outputs[0] in node.input for node in site.scope.makers.values())


@predicate("topk-constant")
def _topk_constant(site: Site) -> str | None:
    if site.scope.opset < 10:
        return None  # K is an attribute
    return None if site.constant(1) is not None else f"K is '{site.inputs[1]}', computed or an input"


@predicate("topk-limit")
def _topk_limit(site: Site) -> str | None:
    k = site.attribute("k") if site.scope.opset < 10 else site.constant(1)
    count = None if k is None else int(np.max(k))
    return f"K is {count}" if count is not None and count > TOPK_LIMIT else None


@predicate("topk-sorted")
def _topk_sorted(site: Site) -> str | None:
    return None if site.attribute("sorted", 1) else "sorted is 0"


@predicate("resize")
def _resize(site: Site) -> str | None:
    for name, refused in (
        ("antialias", (1,)),
        ("coordinate_transformation_mode", ("tf_crop_and_resize", "half_pixel_symmetric")),
    ):
        if site.attribute(name) in refused:
            return f"{name} is {site.attribute(name)}"
    policy = site.attribute("keep_aspect_ratio_policy", "stretch")
    return None if policy == "stretch" else f"keep_aspect_ratio_policy is {policy}"


@predicate("scatter-reduction")
def _scatter_reduction(site: Site) -> str | None:
    reduction = site.attribute("reduction", "none")
    return None if reduction == "none" else f"reduction is {reduction}"


@predicate("scatternd-opset")
def _scatternd_opset(site: Site) -> str | None:
    return f"the opset is {site.scope.opset}" if site.scope.opset >= 18 else None


@predicate("einsum")
def _einsum(site: Site) -> str | None:
    equation = site.attribute("equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "." in equation:
        return f"{equation} has an ellipsis"
    if any(len(set(term)) < len(term) for term in terms):
        return f"{equation} repeats an index"
    sizes: dict[str, set[int]] = {}
    for position, term in enumerate(terms):
        shape = site.shape(position)
        for letter, size in zip(term, shape or (), strict=False):
            if size is not None:
                sizes.setdefault(letter, set()).add(size)
    broadcast = [letter for letter, found in sizes.items() if len(found) > 1]
    return f"{equation} broadcasts {broadcast[0]}" if broadcast else None


@predicate("einsum-letters")
def _einsum_letters(site: Site) -> str | None:
    equation = site.attribute("equation", "")
    return f"the equation is {equation}" if any(c.isupper() for c in equation) else None


@predicate("pow-base")
def _pow_base(site: Site) -> str | None:
    return "its base is of integers" if site.type(0) in INTEGERS else None


@predicate("pow-exponent")
def _pow_exponent(site: Site) -> str | None:
    return "its exponent is of integers" if site.type(1) in INTEGERS else None


@predicate("reduce-axes")
@predicate("squeeze-initialiser")
def _axes_initialiser(site: Site) -> str | None:
    return f"the axes are '{site.inputs[1]}'" if site.has(1) and site.constant(1) is None else None


@predicate("squeeze-axes")
def _axes_fixed(site: Site) -> str | None:
    return f"the axes are '{site.inputs[1]}'" if site.has(1) and not site.scope.is_fixed(site.inputs[1]) else None


@predicate("pad-axes")
def _pad_axes(site: Site) -> str | None:
    return f"the axes are '{site.inputs[3]}'" if site.has(3) else None


@predicate("constant-input")
def _constant_input(site: Site) -> str | None:
    return f"'{site.inputs[1]}' is computed or an input" if site.has(1) and site.constant(1) is None else None


@predicate("eyelike")
def _eyelike(site: Site) -> str | None:
    shape = site.shape(0)
    return "its shape is not fixed" if shape is not None and None in shape else None


@predicate("outputs")
def _outputs(site: Site) -> str | None:
    return f"it also makes '{site.outputs[1]}'" if len(site.outputs) > 1 else None


@predicate("training")
def _training(site: Site) -> str | None:
    if site.op == "BatchNormalization":
        return "training_mode is 1" if site.attribute("training_mode", 0) else None
    if not site.has(2):
        return None
    mode = site.constant(2)
    return None if mode is not None and not mode.any() else "training_mode is not a constant false"


@predicate("dilations")
def _dilations(site: Site) -> str | None:
    dilations = site.attribute("dilations") or []
    return f"dilations are {list(dilations)}" if any(d != 1 for d in dilations) else None


@predicate("constant-kind")
def _constant_kind(site: Site) -> str | None:
    names = [a.name for a in site.node.attribute if a.name in ("sparse_value", "value_string", "value_strings")]
    return f"it holds a {names[0]}" if names else None


@predicate("attention-form")
def _attention_form(site: Site) -> str | None:
    for position, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if site.has(position):
            return f"{name} is given"
    for position, name in enumerate(("Q", "K", "V", "attn_mask")):
        shape = site.shape(position)
        if shape is not None and len(shape) != 4:
            return f"{name} has {len(shape)} dimensions"
    for name in ("softcap", "qk_matmul_output_mode"):
        if site.attribute(name):
            return f"{name} is {site.attribute(name)}"
    return f"it also makes '{site.outputs[1]}'" if len(site.outputs) > 1 else None


@predicate("tensorscatter-form")
def _tensorscatter_form(site: Site) -> str | None:
    shape = site.shape(0)
    if shape is not None and len(shape) != 4:
        return f"the cache has {len(shape)} dimensions"
    axis = site.attribute("axis", -2)
    if axis == -2 or (shape is not None and axis == len(shape) - 2):
        return None
    return f"axis is {axis}"


@predicate("rotary-positions")
def _rotary_positions(site: Site) -> str | None:
    kind = site.type(3)
    return None if kind in (None, TensorProto.INT64) else f"they are {TensorProto.DataType.Name(kind).lower()}"


@predicate("qdq-zero")
def _qdq_zero(site: Site) -> str | None:
    if not site.has(2):
        return None
    zero = site.constant(2)
    if zero is None:
        return f"the zero point '{site.inputs[2]}' is no constant"
    raw = zero.astype(np.float32)
    return f"the zero point is {raw.flat[np.flatnonzero(raw)[0]]:g}" if raw.any() else None


def _codes(site: Site) -> int | None:
    """Type of the quantised values: of DequantizeLinear's input, of QuantizeLinear's zero point or output."""
    if site.op == "DequantizeLinear":
        return site.type(0)
    made = site.attribute("output_dtype", 0)
    return made or site.type(2) or site.scope.type(site.outputs[0])


@predicate("qdq-type")
def _qdq_type(site: Site) -> str | None:
    kind = _codes(site)
    return None if kind is None or kind in QUANTISED else f"they are {TensorProto.DataType.Name(kind).lower()}"


@predicate("qdq-uint8")
def _qdq_uint8(site: Site) -> str | None:
    return "they are uint8" if _codes(site) == TensorProto.UINT8 else None
