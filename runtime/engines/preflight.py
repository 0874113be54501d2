"""Before a long build: what it needs against what there is, in numbers, with advice where it will not fit.

The estimates are rules of thumb from measured builds (docs/engines.md tells which), not promises: a build that the
estimate refuses can be tried all the same with ``--no-preflight``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.key import BuildOptions, batch_of, graph_bytes
from svdprune.runtime.errors import UserError
from svdprune.runtime.machine import Gpu, HostMemory, power_mode
from svdprune.runtime.targets import Target

# Measured with TensorRT-RTX 1.7 on a CPU: resident memory that a build adds is this, and this many times the graph.
BUILD_BASE, BUILD_FACTOR = 350 << 20, 3.2
CONTEXT = 512 << 20  # what CUDA and TensorRT's own kernels take on a device before any engine; an assumption
RUN_BASE = 8 << 20  # scratch of the selection, whatever the encoder's width
ROWS_KEPT = {2: 8, 4: 24}  # scratch of the layers, in rows x width elements of so many bytes
LEAST_WORKSPACE = 4 << 20  # for each picture of a batch: 2 MiB fails, 4 MiB is enough
LEAST_FOR_ROWS = 48  # of a decoder, for each row of the cache times its width: 32 fails, 48 is enough
ENGINE_FACTOR, ENGINE_BASE = 1.1, 16 << 20  # size of an engine, from the graph's
_TIGHT = 0.85  # of the free memory: above it, the user is warned


@dataclass(frozen=True)
class Check:
    """One line of a preflight.

    Attributes:
        name: "memory to build", "disk", ...
        state: "ok", "warning" or "refused"; "unknown" where there is nothing to compare with.
        found: what was found, in words with numbers.
        advice: what to do, "" where nothing needs doing.
        needed, free: bytes, where the line is about bytes.
    """

    name: str
    state: str
    found: str
    advice: str = ""
    needed: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes that building and running an engine take, on the CPU's and on the GPU's side."""

    build_host: int
    build_device: int
    run_device: int
    engine: int


def estimate(bundle: Bundle, part: str, options: BuildOptions, on_device: bool) -> Estimate:
    """What an engine of ``part`` should take.

    Args:
        on_device: whether the build times kernels on the GPU, as full TensorRT does.
    """
    graph = graph_bytes(bundle, part)
    vision, decoder = bundle.manifest.vision, bundle.manifest.decoder
    if part == "vision":
        tokens = vision.grid[0] * vision.grid[1]
        rows, width, kept = batch_of(vision, options)[2] * tokens, vision.channels, 0
        element = 4 if vision.precision == "fp32" else 2
    else:
        assert decoder.engine is not None  # graph_bytes has refused a bundle without
        rows, width = decoder.engine.cache, decoder.hidden
        element = 4 if decoder.engine.precision == "fp32" else 2
        kept = 2 * decoder.layers * decoder.kv_heads * decoder.engine.cache * decoder.head_dim * element
    running = RUN_BASE + ROWS_KEPT[element] * rows * width * element + kept
    timing = (CONTEXT + graph + running + (options.workspace or 0)) if on_device else 0
    return Estimate(
        build_host=BUILD_BASE + int(BUILD_FACTOR * graph),
        build_device=timing,
        run_device=CONTEXT + graph + running,
        engine=ENGINE_BASE + int(ENGINE_FACTOR * graph),
    )


def check_workspace(bundle: Bundle, part: str, options: BuildOptions) -> None:
    """Refuse a memory limit with which no build was seen to succeed.

    Raises:
        UserError: naming the least.
    """
    engine = bundle.manifest.decoder.engine
    if part == "vision":
        batch = batch_of(bundle.manifest.vision, options)[2]
        what = "pictures" if bundle.manifest.vision.tiles is None else "tiles"
        least = LEAST_WORKSPACE * batch
        each = f", {LEAST_WORKSPACE >> 20} MiB for each of {batch} {what}" if batch > 1 else ""
    else:
        assert engine is not None  # the part was chosen because it is there
        least = max(LEAST_WORKSPACE, LEAST_FOR_ROWS * engine.cache * bundle.manifest.decoder.hidden)
        each = f" for a cache of {engine.cache:,} rows"
    if options.workspace is not None and options.workspace < least:
        enough = math.ceil(least / 2**30 * 1e4) / 1e4
        raise UserError(
            f"--workspace is {options.workspace / 2**20:.3g} MiB and the {part} engine needs at least "
            f"{least / 2**20:.3g} MiB{each}: give {enough} GiB or more, or leave it out"
        )


def preflight(
    bundle: Bundle,
    part: str,
    trt: Installation,
    target: Target,
    options: BuildOptions,
    gpu: Gpu | None,
    memory: HostMemory | None,
) -> list[Check]:
    """The checks of one part, most important first.

    Args:
        gpu: this machine's, None without one.
        memory: the CPU's; on a Jetson the GPU's as well.
    """
    needs = estimate(bundle, part, options, trt.needs_gpu)
    shared = gpu is not None and gpu.shared
    checks = [_memory_check(needs, memory, shared, part, options)]
    if trt.needs_gpu and gpu is not None and not shared:
        checks.append(_device_check(needs, gpu, part, options))
    here = gpu is not None and gpu.sm == target.sm
    checks.append(_run_check(needs, gpu if here else None, target))
    checks.append(_version_check(trt, target))
    if shared:
        checks.append(_power_check())
    return checks


def refuse(checks: list[Check]) -> None:
    """Refuse a build of which a check says that it will not fit.

    Raises:
        UserError: with the numbers and the advice.
    """
    for check in checks:
        if check.state == "refused":
            raise UserError(f"{check.name}: {check.found}: {check.advice}; or try all the same with --no-preflight")


def _memory_check(needs: Estimate, memory: HostMemory | None, shared: bool, part: str, options: BuildOptions) -> Check:
    """The CPU's memory, which on a Jetson is all there is."""
    needed = needs.build_host + (needs.build_device if shared else 0)
    name = "memory to build"
    if memory is None:
        return Check(name, "unknown", f"about {_gb(needed)} are needed, the free memory is not known here", "", needed)
    kind = "shared by CPU and GPU" if shared else "of the CPU"
    found = f"about {_gb(needed)} are needed, {_gb(memory.available)} of {_gb(memory.total)} {kind} are free"
    advice = _memory_advice(part, options, shared)
    state = "refused" if needed > memory.available else "warning" if needed > _TIGHT * memory.available else "ok"
    return Check(name, state, found, "" if state == "ok" else advice, needed, memory.available)


def _memory_advice(part: str, options: BuildOptions, shared: bool) -> str:
    """What makes a build smaller or the memory larger, the most useful first."""
    ways = ["close other programs"]
    if shared:
        ways.append("stop the desktop (`sudo systemctl isolate multi-user`, about 1 GB)")
        ways.append("add swap, into which other programs can go")
        if options.workspace is None:
            ways.append("limit the scratch memory (--workspace 0.5)")
    if part == "decoder":
        ways.append("build the vision engine alone (--part vision), which is chained to the ONNX Runtime decoder")
    elif options.batch[2] > 1:
        ways.append("build for fewer pictures (--batch 1,1,1)")
    ways.append("or export a smaller model, in fp16 or with fewer tokens (--keep)")
    return ", ".join(ways)


def _device_check(needs: Estimate, gpu: Gpu, part: str, options: BuildOptions) -> Check:
    """A discrete GPU's memory, in which kernels are timed."""
    name, needed = "GPU memory to build", needs.build_device
    if gpu.free is None or gpu.total is None:
        return Check(name, "unknown", f"about {_gb(needed)} are needed, the driver shows no free memory", "", needed)
    found = f"about {_gb(needed)} are needed, {_gb(gpu.free)} of {_gb(gpu.total)} of {gpu.name} are free"
    state = "refused" if needed > gpu.free else "warning" if needed > _TIGHT * gpu.free else "ok"
    return Check(name, state, found, "" if state == "ok" else _memory_advice(part, options, False), needed, gpu.free)


def _run_check(needs: Estimate, gpu: Gpu | None, target: Target) -> Check:
    """Whether the engine will fit when it runs: here, or by the target's data."""
    name, needed = "memory to run", needs.run_device
    total = gpu.total if gpu is not None else None if target.memory_gb is None else target.memory_gb * 10**9
    where = gpu.name if gpu is not None else f"the {target.device}"
    if total is None:
        return Check(name, "unknown", f"about {_gb(needed)} are needed", "", needed)
    fits = needed <= _TIGHT * total
    advice = "" if fits else "export a smaller model, in fp16 or with fewer tokens (--keep)"
    found = f"this engine takes about {_gb(needed)}, {where} has {_gb(total)} in all"
    return Check(name, "ok" if fits else "warning", found, advice, needed, total)


def _version_check(trt: Installation, target: Target) -> Check:
    """Whether the target's releases, for which the export checked the graph, have this TensorRT."""
    name = "TensorRT"
    if not trt.needs_gpu:
        return Check(name, "ok", f"{trt.title}, which shows that the graph builds; it is not the target's own TensorRT")
    known = [release.tensorrt for release in target.releases if release.tensorrt is not None]
    if any(_numbers(trt.version)[: len(_numbers(version))] == _numbers(version) for version in known):
        return Check(name, "ok", f"{trt.title}, of {target.name}'s releases")
    found = f"{trt.title}, {target.name}'s releases have {', '.join(known)}"
    if known and all(_numbers(trt.version) < _numbers(version) for version in known):
        return Check(name, "warning", found, "an older TensorRT may refuse the graph: update it if the build fails")
    return Check(name, "warning", found, "the graph was checked for those: run `svdprune verify` after the build")


def _power_check() -> Check:
    """A Jetson's power mode: a low one makes a long build longer, and timings in it do not hold for another."""
    mode = power_mode()
    if mode is None:
        return Check("power mode", "unknown", "it cannot be read here")
    if mode.upper().startswith("MAXN"):
        return Check("power mode", "ok", mode)
    advice = "kernels are chosen by their speed in this mode: set the one that the engine will run in (`nvpmodel -m 0`)"
    return Check("power mode", "warning", mode, advice)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
