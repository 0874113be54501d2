"""Vision engines as ``profile`` runs them: the bundle's, and one of the unpruned graph built for the comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from svdprune.runtime.arrays import AnyArray
from svdprune.runtime.engines.adapter import TensorRt, find_tensorrt
from svdprune.runtime.engines.build import profiles_of
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.key import BuildOptions
from svdprune.runtime.engines.open import open_engine
from svdprune.runtime.engines.progress import BuildLog, Progress
from svdprune.runtime.engines.session import EngineSession
from svdprune.runtime.engines.store import find_engine
from svdprune.runtime.profile.graphs import Graph
from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.runners import CallRunner, Feed, inputs_of
from svdprune.runtime.profile.trt_layers import engine_layers
from svdprune.runtime.vlm import Vlm


def pruned_engine(vlm: Vlm) -> Graph:
    """The engine that ``vlm`` has opened."""
    vision: Any = vlm.vision  # EngineVision
    runner = _runner("pruned", vlm, vision.session)
    return Graph("pruned", runner, vlm.manifest.vision.keep, partial(_stored_layers, vlm))


def unpruned_engine(vlm: Vlm, graph: Path, stack: ExitStack) -> Graph:
    """Build an engine of the unpruned graph with the options of the bundle's own, in memory.

    Raises:
        UserError, SvdpruneError: TensorRT does not take the graph, or the build failed.
    """
    vision: Any = vlm.vision
    device: Device = vision.device
    trt = find_tensorrt(vlm.vision.name)
    data = _build(trt, vlm, graph, device)
    session = EngineSession(trt, data, device, "the unpruned vision engine")
    stack.callback(session.close)
    return Graph(
        "unpruned", _runner("unpruned", vlm, session), vlm.manifest.vision.tokens, partial(_layers, trt, data, False)
    )


def _build(trt: TensorRt, vlm: Vlm, graph: Path, device: Device) -> Any:
    options = find_engine(vlm.bundle, "vision", trt, device.sm, verify=False).key.options
    network, log = trt.network_from_onnx(graph), BuildLog()
    least, likely, most = options.get("batch", (1, 1, 1))
    config = trt.config(
        network,
        profiles_of(vlm.bundle, "vision", BuildOptions((least, likely, most)), network.inputs),
        sm=None if trt.needs_gpu else device.sm,
        workspace=options.get("workspace"),
        level=options.get("level"),
    )
    return trt.build(network, config, log, Progress(), "building the unpruned vision engine")


def _runner(name: str, vlm: Vlm, session: EngineSession) -> CallRunner:
    """An engine as it runs in an answer: its CUDA graph, and the features left for a decoder on the same GPU."""
    whole = vlm.manifest.vision.tiles is None  # the rows of tiles are put together on the host
    stays: Collection[str] = ("features",) if whole and vlm.decoder.device is vlm.vision.device else ()

    def run(feed: Feed) -> Mapping[str, AnyArray]:
        return session.run(feed, on_device=stays, repeats=True)

    return CallRunner(name, inputs_of(vlm.manifest.vision), lambda: nullcontext(run))


def _stored_layers(vlm: Vlm, feed: Feed, runs: int, warm_up: int) -> LayerTable:
    vision: Any = vlm.vision
    with open_engine(vlm.bundle, "vision", vlm.vision.name, vision.device, verify=False) as engine:
        return _layers(engine.trt, engine.data, engine.host_code, feed, runs, warm_up)


def _layers(trt: Installation, data: Any, host_code: bool, feed: Feed, runs: int, warm_up: int) -> LayerTable:
    return engine_layers(trt, trt.deserialize(data, host_code=host_code), feed, runs, warm_up)
