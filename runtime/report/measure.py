"""A short measurement for the page, where `svdprune profile` and its packages would be too much to ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from svdprune.runtime.arrays import AnyArray
from svdprune.runtime.ort import CPU, open_session
from svdprune.runtime.profile.graphs import Graph
from svdprune.runtime.profile.measure import Plan, arm_of, in_turn
from svdprune.runtime.profile.report import ProfileReport, ratios
from svdprune.runtime.profile.runners import Call, CallRunner, Feed, inputs_of
from svdprune.runtime.profile.where import backend_versions, where
from svdprune.runtime.tiling.feed import slots_of
from svdprune.runtime.unpruned import unpruned_graph
from svdprune.runtime.verify_golden import read_golden
from svdprune.runtime.vlm import Vlm

SECONDS = 2.0  # that the counted runs should take together
PATIENCE = 15.0  # a first round that takes longer is not followed by another
MOST_RUNS = 5
NEW_TOKENS = 4


def quick_profile(vlm: Vlm, folder: Path, threads: int | None = None) -> ProfileReport:
    """Time the stages of the golden answer, pruned and unpruned in turn, for about ``SECONDS`` (one run each at least).

    The first round warms up; where it alone takes longer than ``PATIENCE``, it is what is reported.

    Args:
        vlm: opened with a vision backend of ONNX Runtime on the CPU.
        folder: for the unpruned graph, which is made and run here.

    Returns:
        The report; without the unpruned arm where nothing is pruned, or all tokens do not fit the decoder's context.

    Raises:
        MissingDependency: onnx, which takes the selection out of the graph, is not installed.
        NumericalError: NaN or infinity on the way.
    """
    info, golden = vlm.manifest.vision, read_golden(vlm.bundle)
    graphs = [Graph("pruned", _runner(vlm, "pruned", lambda: nullcontext(partial(_pruned, vlm))), info.keep)]
    rows = len(golden.prompt_ids) - 1 + golden.total + NEW_TOKENS
    if len(golden.kept) < len(golden.scores) and rows <= vlm.manifest.decoder.context:
        opened = partial(_unpruned, vlm, folder, threads)
        graphs.append(Graph("unpruned", _runner(vlm, "unpruned", opened), info.tokens))
    found = where("onnxruntime", "onnxruntime", threads, backend_versions(vlm))
    with ExitStack() as active:
        for graph in graphs:
            active.enter_context(graph.runner)
        began = time.perf_counter()
        plan = Plan(runs=1, warm_up=0, new_tokens=NEW_TOKENS, layers=False)
        timings = in_turn(vlm, graphs, golden.picture, golden.question, plan, _silent)
        first = time.perf_counter() - began
        if first < PATIENCE:
            runs = max(1, min(MOST_RUNS, int(SECONDS / first)))
            plan = Plan(runs, 0, NEW_TOKENS, layers=False)
            timings = in_turn(vlm, graphs, golden.picture, golden.question, plan, _silent)
            plan = replace(plan, warm_up=1)
    arms = [arm_of(graph, timings[graph.name], None, wanted=False) for graph in graphs]
    pruned, whole = arms[0], arms[1] if len(arms) > 1 else None
    return ProfileReport(
        bundle=vlm.bundle.path.name,
        model=vlm.manifest.model.id,
        target=vlm.manifest.target,
        vision=vlm.vision.name,
        vision_precision=info.precision,
        decoder=vlm.decoder.name,
        decoder_precision=vlm.manifest.decoder.precision,
        image=vlm.manifest.golden.image,
        question=golden.question,
        tokens=info.tokens,
        runs=plan.runs,
        warm_up=plan.warm_up,
        new_tokens=plan.new_tokens,
        where=found,
        pruned=pruned,
        unpruned=whole,
        ratios=ratios(pruned, whole),
    )


def _runner(vlm: Vlm, name: str, opened: Callable[[], AbstractContextManager[Call]]) -> CallRunner:
    return CallRunner(name, inputs_of(vlm.manifest.vision), opened)


def _pruned(vlm: Vlm, feed: Feed) -> Mapping[str, AnyArray]:
    output = vlm.vision.encode(feed["pixels"], slots=slots_of(feed))
    made = {"features": output.features, "kept_indices": output.kept_indices, "scores": output.scores}
    return made if output.deepstack is None else {**made, "deepstack": output.deepstack}


@contextmanager
def _unpruned(vlm: Vlm, folder: Path, threads: int | None) -> Iterator[Call]:
    graph = unpruned_graph(vlm.bundle.file(vlm.manifest.vision.file), folder / "unpruned.onnx")
    session: Any = open_session(graph, threads, CPU)
    names = [value.name for value in session.get_outputs()]
    yield lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def _silent(step: str, share: float | None) -> None:
    """Two seconds need no progress."""
