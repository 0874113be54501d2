"""The compile gate: a vision graph keeps to the rules of every release, and TensorRT-RTX makes an engine of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdprune.exporter.families import VisionSpec
from svdprune.exporter.rules import check_graph
from svdprune.runtime.targets import RELEASES


def assert_passes(graph: Path, spec: VisionSpec | None = None, capability: str = "SM89") -> None:
    """Check the rules, then build an engine for the least, likely and most tiles of `spec`, or for one picture."""
    for release in RELEASES:
        assert check_graph(graph, release.tensorrt) == [], release.name
    tiles = None if spec is None else spec.tiles()
    assert_builds(graph, (1, 1, 1) if tiles is None else (tiles.least, tiles.likely, tiles.most), capability)


def assert_builds(graph: Path, batches: tuple[int, int, int], capability: str = "SM89") -> None:
    """Build an engine for the least, likely and greatest batch; skipped where TensorRT-RTX is not installed."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *((count, *tuple(tensor.shape)[1:]) for count in batches))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
