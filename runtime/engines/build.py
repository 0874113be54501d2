"""Build a bundle's engines: choose TensorRT, reuse or check, build, keep, test by the golden case."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdprune.runtime.bundle import Bundle, open_bundle
from svdprune.runtime.engines.adapter import TensorRt
from svdprune.runtime.engines.choice import Choice, choose, choose_parts
from svdprune.runtime.engines.key import (
    BuildOptions,
    EngineKey,
    Profile,
    batch_of,
    graph_bytes,
    graph_digest,
    graph_files,
)
from svdprune.runtime.engines.preflight import Check, check_workspace, estimate, preflight, refuse
from svdprune.runtime.engines.progress import BuildLog, Progress, append_log, start_log
from svdprune.runtime.engines.selftest import selftest, untested
from svdprune.runtime.engines.store import (
    PASSED,
    EngineFile,
    drop_engine,
    list_engines,
    prepare_store,
    put_engine,
    timing_cache,
    write_beside,
)
from svdprune.runtime.engines.watch import MemoryWatch, Report, run_watched
from svdprune.runtime.errors import UserError
from svdprune.runtime.machine import Gpu, host_memory, local_gpu, resolve_target

OWN = "bundle"  # --target: the bundle's own


@dataclass(frozen=True)
class BuildRequest:
    """What ``build_engines`` is asked for.

    Attributes:
        target: a target's name, "auto" for this machine, "bundle" for the bundle's own.
        runtime: "tensorrt", "tensorrt_rtx" or "auto".
        part: "vision", "decoder" or "all" (those that the bundle and this TensorRT can).
        options: see ``BuildOptions``.
        force: build even where an engine of the same key is there.
        check: refuse a build that the preflight's estimate says will not fit.
        log: a file for all that TensorRT says, or None.
    """

    target: str = OWN
    runtime: str = "auto"
    part: str = "all"
    options: BuildOptions = field(default_factory=BuildOptions)
    force: bool = False
    check: bool = True
    log: Path | None = None


@dataclass(frozen=True)
class PartResult:
    """What became of one part.

    Attributes:
        state: "built", "reused" (an engine of the same key was there) or "rebuilt" (in place of ``stale``).
        engine: the engine.
        stale: why an earlier engine no longer fitted, "" when there was none.
        checks: the preflight's lines; none for a reused engine.
    """

    part: str
    state: str
    engine: EngineFile
    stale: str = ""
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class BuildReport:
    """The outcome of ``build_engines``: with what and for what, each part, and sentences to tell the user."""

    bundle: str
    target: str
    runtime: str
    parts: list[PartResult]
    notes: list[str]


def build_engines(path: str | Path, request: BuildRequest, report: Report = lambda step, share: None) -> BuildReport:
    """Build the engines of the bundle at ``path``, or reuse those that are there.

    Args:
        report: called with the step and its share of the whole (0 to 1, or None), in the calling thread.

    Raises:
        UserError: no TensorRT, no GPU, a target without TensorRT, a read-only bundle, too little memory or disk, ...
        SvdpruneError: TensorRT failed, or an engine failed its self-test and was removed.
        KeyboardInterrupt: Ctrl-C; no partial engine stays.
    """
    bundle = open_bundle(path, verify=False)
    name = bundle.manifest.target if request.target == OWN else request.target
    target = resolve_target(name).target
    gpu = local_gpu()
    choice = choose(target, request.runtime, gpu, request.target == OWN)
    parts, notes = choose_parts(bundle, choice.trt, request.part)
    for part in parts:
        check_workspace(bundle, part, request.options)
    if request.log is not None:
        start_log(request.log)
    report("checking the bundle", None)
    bundle = open_bundle(path)  # every hash: the key is made of them
    results = [_build_part(bundle, part, choice, request, gpu, report) for part in parts]
    tested, said = _test(bundle, choice, results, gpu, report)
    return BuildReport(str(path), target.name, choice.trt.title, tested, [*choice.notes, *notes, *said])


def _build_part(
    bundle: Bundle, part: str, choice: Choice, request: BuildRequest, gpu: Gpu | None, report: Report
) -> PartResult:
    """One part: the engine of the same key, or a new one."""
    trt, options = choice.trt, request.options
    key = EngineKey(trt.name, trt.version, choice.sm, graph_digest(bundle, part), options.of_part(part))
    earlier = [file for file in list_engines(bundle) if file.part == part and _same_place(file.key, key)]
    same = next((file for file in earlier if file.key == key), None)
    stale = ""
    if same is not None and not request.force:
        try:
            same.check()
            return PartResult(part, "reused", same)
        except UserError as error:
            stale = str(error)
    needs = estimate(bundle, part, options, trt.needs_gpu)
    checks = preflight(bundle, part, trt, choice.target, options, gpu, host_memory())
    if request.check:
        refuse(checks)
    prepare_store(bundle, needs.engine)
    old = [file for file in earlier if file.key != key and file.key.options == key.options]
    stale = stale or "; ".join(_difference(file.key, key) for file in old)
    engine = _build(bundle, part, key, choice, request, gpu, report)
    for file in old:
        drop_engine(file)
    return PartResult(part, "rebuilt" if stale or same else "built", engine, stale, checks)


def _build(
    bundle: Bundle, part: str, key: EngineKey, choice: Choice, request: BuildRequest, gpu: Gpu | None, report: Report
) -> EngineFile:
    """Parse, build and keep one engine."""
    trt, options, doing = choice.trt, request.options, f"building the {part} engine"
    if options.workspace is not None:
        doing += f" with a workspace of {options.workspace / 2**30:g} GiB"
    log, progress = BuildLog(keep=request.log is not None), Progress()
    watch = MemoryWatch(gpu if trt.needs_gpu else None)
    cache = timing_cache(bundle, trt, key.sm) if trt.keeps_timings else None
    began, processor = time.perf_counter(), time.process_time()
    try:
        report(f"reading the {part} graph", None)
        network = trt.network_from_onnx(bundle.path / graph_files(bundle, part)[0], log)
        config = trt.config(
            network,
            profiles_of(bundle, part, options, network.inputs),
            sm=key.sm,
            workspace=options.workspace,
            level=options.level,
            version_compatible=options.version_compatible,
            timings=None if cache is None else cache.read_bytes() if cache.is_file() else b"",
            monitor=trt.monitor(progress),
        )
        work = functools.partial(trt.build, network, config, log, progress, doing)
        data = run_watched(work, progress, watch, report, doing)
    finally:
        if request.log is not None:
            append_log(request.log, log.lines)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - processor
    if cache is not None:
        write_beside(cache, trt.timings_of(config))
    info = {
        "target": choice.target.name,
        "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "layers": _layers(trt, data, log, choice, gpu),
        "graph_bytes": graph_bytes(bundle, part),
        "peak_memory": watch.result(),
        "memory": log.sizes,
        "warnings": log.warnings,
        "selftest": untested(choice, gpu),
        "written_by": importlib.metadata.version("svdprune"),
    }
    report(f"writing the {part} engine", None)
    return put_engine(bundle, part, key, data, info)


def profiles_of(bundle: Bundle, part: str, options: BuildOptions, inputs: dict[str, tuple[int, ...]]) -> list[Profile]:
    """The optimisation profiles of a part: sizes of each input that varies.

    Vision: one, for ``options.batch`` pictures or the tiles of one.
    Decoder: the first takes from 1 row to a whole cache, for prefill; the second is for a step of decoding, so that
    kernels are chosen for one row. It reaches to two, as TensorRT-RTX has no attention kernel for exactly one.
    """
    varying = {name: shape for name, shape in inputs.items() if -1 in shape}
    if part == "vision":
        rows = [batch_of(bundle.manifest.vision, options)]
    else:
        engine, vision = bundle.manifest.decoder.engine, bundle.manifest.vision
        assert engine is not None
        likely = min(engine.cache, 2 * vision.keep + 32)  # the picture's tokens, and a question about as long
        rows = [(1, likely, engine.cache), (1, 1, min(2, engine.cache))]

    def filled(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        return tuple(count if size == -1 else size for size in shape)

    return [
        {name: (filled(shape, low), filled(shape, mid), filled(shape, high)) for name, shape in varying.items()}
        for low, mid, high in rows
    ]


def _layers(trt: TensorRt, data: Any, log: BuildLog, choice: Choice, gpu: Gpu | None) -> int | None:
    """Layers of the engine: as the builder listed them, else as the engine counts them where it can be opened."""
    if log.layers:
        return log.layers
    if gpu is None or gpu.sm != choice.sm:
        return None
    engine = trt.deserialize(data, host_code=True)
    layers: int = engine.num_layers
    return layers


def _test(
    bundle: Bundle, choice: Choice, results: list[PartResult], gpu: Gpu | None, report: Report
) -> tuple[list[PartResult], list[str]]:
    """Replay the golden case with the engines that were not tested yet."""
    fresh = [result for result in results if result.engine.selftest != PASSED]
    if not fresh:
        return results, []
    engines, said = selftest(bundle, choice, [result.engine for result in fresh], gpu, report)
    noted = {engine.path: engine for engine in engines}
    parts = [
        PartResult(item.part, item.state, noted.get(item.engine.path, item.engine), item.stale, item.checks)
        for item in results
    ]
    return parts, said


def _same_place(one: EngineKey, other: EngineKey) -> bool:
    """Whether two engines are for the same kind of TensorRT on the same kind of GPU."""
    return (one.runtime, one.sm) == (other.runtime, other.sm)


def _difference(old: EngineKey, new: EngineKey) -> str:
    """Why an engine of ``old`` does not do for ``new``."""
    reasons = []
    if old.version != new.version:
        reasons.append(f"built by version {old.version}, this is {new.version}")
    if old.graph != new.graph:
        reasons.append("of another graph")
    return " and ".join(reasons)
