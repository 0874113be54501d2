"""Time of every layer of an engine: TensorRT's profiler has the times, its engine inspector what a layer is made of."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.profile.layers import LayerTable, layer_table
from svdprune.runtime.profile.runners import Feed, Runner, polygraphy

_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")  # in an inspected layer's metadata
_WORD = re.compile(r"[\w.:/-]+/[\w.:-]+")  # an ONNX node's name with a path, inside a layer's name


def engine_layers(trt: Installation, engine: Any, feed: Feed, runs: int, warm_up: int) -> LayerTable:
    """Run an engine under TensorRT's profiler, in Polygraphy's runner and apart from the timed runs, which it slows.

    Args:
        trt: the library. engine: its ``ICudaEngine``, built with detailed profiling verbosity.
        feed: the inputs. runs: how many count, after ``warm_up``.

    Raises:
        SvdpruneError: there is no context, or the profiler reported nothing.
    """
    context = engine.create_execution_context()
    if context is None:
        raise SvdpruneError(f"{trt.title} has no memory for a second context: profile with --layers 0")
    collected = _profiler(trt.module)
    operators, nodes = inspect(trt.module, engine, context)
    measured: list[dict[str, float]] = []
    with trt_runner(trt, context) as runner:
        context.profiler = collected
        for number in range(warm_up + runs):
            collected.seconds = defaultdict(float)
            runner.infer(feed)
            if number >= warm_up:
                measured.append(dict(collected.seconds))
    if not any(measured):
        raise SvdpruneError(f"{trt.title}'s profiler reported no layer: profile with --layers 0")
    made_of = {name: nodes.get(name, []) for run in measured for name in run}
    return layer_table(f"{trt.title}'s profiler", measured, operators, made_of)


def inspect(trt: Any, engine: Any, context: Any) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What the engine inspector says of each layer: its kind, and the ONNX nodes it is made of.

    An engine built for layer names only has names to go by, in which TensorRT writes nodes where it knows them.
    """
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    content = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    operators: dict[str, str] = {}
    nodes: dict[str, list[str]] = {}
    for layer in content["Layers"]:
        facts: Mapping[str, Any] = layer if isinstance(layer, dict) else {"Name": layer}
        name = str(facts["Name"])
        operators[name] = str(facts.get("LayerType", ""))
        nodes[name] = _ONNX.findall(str(facts.get("Metadata", ""))) or _WORD.findall(name)
    return operators, nodes


def trt_runner(trt: Installation, context: Any) -> Runner:
    """Polygraphy's ``TrtRunner`` over an execution context of ``trt``."""
    polygraphy("polygraphy.config").USE_TENSORRT_RTX = trt.name == "tensorrt_rtx"  # read when its backend is imported
    runner: Runner = polygraphy("polygraphy.backend.trt").TrtRunner(context, name=trt.title)
    return runner


def _profiler(trt: Any) -> Any:
    """An ``IProfiler`` that adds up the seconds of each layer by its name."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seconds: defaultdict[str, float] = defaultdict(float)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seconds[layer_name] += ms * 1e-3

    return Profiler()
