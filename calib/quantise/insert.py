"""Q/DQ pairs around every site of a graph, by ONNX Runtime's static quantiser."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData
from onnxruntime.quantization.calibrate import CalibrationMethod
from onnxruntime.quantization.quant_utils import add_infer_metadata

from svdprune.calib.quantise.ranges import FLOAT8_SPREAD, Magnitudes, scale_of
from svdprune.calib.quantise.scheme import Scheme
from svdprune.calib.quantise.sites import Site

EMBEDDED = 1024  # bytes: tensors up to this stay inside the graph's file


def quantise_all(
    graph: Path,
    out: Path,
    sites: Sequence[Site],
    ranges: Mapping[str, Magnitudes],
    scheme: Scheme,
    rule: str,
    *,
    narrow_weights: bool = False,
) -> None:
    """Write `graph` with all of `sites` quantised to `out`, its weights to `<out>.data`.

    Each site reads its activation through a Q/DQ pair of its own and its weight, stored in 8 bits, through a DQ;
    nothing else changes, and the names of nodes and values stay. The opset is raised where the scheme needs it.

    Args:
        graph: float32 or float16, opset 18 or later: from there on a later opset changes no operator's meaning.
        ranges: of each site's activation.
        rule: how an activation's range is set, see ``Magnitudes.range``; weights take theirs from their largest, or
            from their spread by the rule ``distribution``.
        narrow_weights: 8-bit integer weights use 7 of their bits. x86 CPUs without VNNI instructions add pairs of
            products in 16 bits, which overflow otherwise.
    """
    model = onnx.load(str(graph))
    half = any(i.data_type == onnx.TensorProto.FLOAT16 and len(i.dims) > 1 for i in model.graph.initializer)
    number: type[np.floating[Any]] = np.float16 if half else np.float32
    floor = float(np.finfo(number).tiny)  # smaller scales lose digits, and ONNX Runtime takes them for 1 at some point
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, scheme.opset(half))
    _declare(model, graph, sites)
    scales = {site.activation: max(scale_of(ranges[site.activation], rule, scheme), floor) for site in sites}
    if scheme.name == "fp8":
        kind, method = QuantType.QFLOAT8E4M3FN, CalibrationMethod.Distribution
        seen = {name: TensorData(avg=number(0), std=number(scale * FLOAT8_SPREAD)) for name, scale in scales.items()}
    else:
        kind, method = QuantType.QInt8, CalibrationMethod.MinMax
        ends = {name: number(scale * scheme.largest) for name, scale in scales.items()}
        seen = {name: TensorData(lowest=-end, highest=end) for name, end in ends.items()}
    quantiser = QDQQuantizer(
        model,
        per_channel=scheme.per_channel,
        reduce_range=narrow_weights,
        weight_qType=kind,
        activation_qType=kind,
        tensors_range=TensorsData(method, seen),
        nodes_to_quantize=[site.node for site in sites],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in _site_nodes(model, sites)}),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"],
            "MinimumRealRange": 2 * scheme.largest * floor,
            "TensorQuantOverrides": _float8_weights(model, sites, rule, scheme, kind, number, floor)
            if scheme.name == "fp8"
            else {},
        },
    )
    with _quiet():
        quantised = quantiser.quantize_model()
    quantiser.model.topological_sort()  # the new nodes stand at the end
    out.with_name(f"{out.name}.data").unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(
        quantised, str(out), save_as_external_data=True, location=f"{out.name}.data", size_threshold=EMBEDDED
    )


def _site_nodes(model: Any, sites: Sequence[Site]) -> Iterator[Any]:
    names = {site.node for site in sites}
    return (node for node in model.graph.node if node.name in names)


def _declare(model: Any, graph: Path, sites: Sequence[Site]) -> None:
    """State the type of every activation, by shape inference where the graph does not."""
    declared = {info.name for info in (*model.graph.value_info, *model.graph.input)}
    missing = {site.activation for site in sites} - declared
    if missing:
        bare = onnx.load(str(graph), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(bare).graph.value_info
        model.graph.value_info.extend(info for info in inferred if info.name in missing)
    add_infer_metadata(model)  # or ONNX Runtime writes and reads all of it again to infer the types


def _float8_weights(
    model: Any, sites: Sequence[Site], rule: str, scheme: Scheme, kind: Any, number: Any, floor: float
) -> dict[str, list[dict[str, Any]]]:
    """Scales of 8-bit float weights: ONNX Runtime's own are the spread's only."""
    arrays = {i.name: i for i in model.graph.initializer}
    found = {}
    for name in {site.weight for site in sites}:
        magnitudes = Magnitudes()
        magnitudes.add(onnx.numpy_helper.to_array(arrays[name]))
        scale = max(scale_of(magnitudes, rule, scheme), floor)
        found[name] = [{"quant_type": kind, "scale": number(scale), "zero_point": 0}]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantiser logs what it does to every tensor."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
