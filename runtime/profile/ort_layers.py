"""Time of every node on ONNX Runtime, from the profile that a session writes."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.errors import SvdpruneError
from svdprune.runtime.ort import CPU, open_session
from svdprune.runtime.profile.layers import LayerTable, layer_table
from svdprune.runtime.profile.runners import onnxrt_runner

_SUFFIX = "_kernel_time"


def ort_layers(path: Path, feed: Mapping[str, np.ndarray], threads: int | None, runs: int, warm_up: int) -> LayerTable:
    """Run a graph with ONNX Runtime's profiling on, apart from the timed runs, which it slows.

    Args:
        path: the graph. feed: its inputs. threads: as ``open_session``. runs: how many count, after ``warm_up``.

    Raises:
        BundleError: the graph does not load. SvdpruneError: ONNX Runtime wrote no usable profile.
    """
    with tempfile.TemporaryDirectory(prefix="svdprune-profile-") as folder:
        session = open_session(path, threads, CPU, profile=Path(folder) / "nodes")
        with onnxrt_runner(session, "profiled") as runner:
            for _ in range(warm_up + runs):
                runner.infer(feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return read_events(events, warm_up)


def read_events(events: list[dict[str, Any]], warm_up: int) -> LayerTable:
    """The table of a profile: a list of trace events, of which ``model_run`` and the nodes' kernels count.

    Raises:
        SvdpruneError: no run after the warm-up is in it.
    """
    begun = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"]
    begun.sort(key=lambda event: event["ts"])
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
    runs: list[dict[str, float]] = []
    operators: dict[str, str] = {}
    for run in begun[warm_up:]:
        seconds: defaultdict[str, float] = defaultdict(float)
        for event in kernels:
            if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                name = event["name"].removesuffix(_SUFFIX)
                seconds[name] += event["dur"] * 1e-6
                operators[name] = event["args"].get("op_name", "")
        if seconds:
            runs.append(seconds)
    if not runs:
        raise SvdpruneError("ONNX Runtime wrote a profile without a run in it: profile with --layers 0")
    return layer_table("ONNX Runtime's profile", runs, operators, {})
