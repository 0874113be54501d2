"""TensorRT 10, TensorRT 11 and TensorRT-RTX as one: the only place that names their API for building engines.

What differs between releases is found by ``hasattr``, never by comparing versions. Networks are strongly typed in all
of them: types come from the graph, as TensorRT 11 has no other way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdprune.runtime.engines.faults import explain
from svdprune.runtime.engines.installation import TITLES, Installation
from svdprune.runtime.engines.key import Profile
from svdprune.runtime.engines.progress import BuildLog, Progress, causes, first_line
from svdprune.runtime.errors import MissingDependency, SvdpruneError, UserError
from svdprune.runtime.lazy import require

RUNTIMES = ("tensorrt", "tensorrt_rtx")
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
_OLDEST = 10  # major version of full TensorRT; 8 lacks what the graphs need
_NEEDED = ("Builder", "OnnxParser", "Runtime", "BuilderFlag", "NetworkDefinitionCreationFlag")


@dataclass(frozen=True)
class Network:
    """A parsed graph with what must live as long as it: the builder, the logger, the parser (it owns the weights)."""

    builder: Any
    definition: Any
    parser: Any
    logger: Any

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each input, -1 where it may vary."""
        tensors = (self.definition.get_input(index) for index in range(self.definition.num_inputs))
        return {tensor.name: tuple(tensor.shape) for tensor in tensors}


def find_tensorrt(name: str) -> TensorRt:
    """The installed TensorRT called ``name``.

    Raises:
        UserError: an unknown name, not installed, installed in part, or older than 10; the sentence says what to do.
    """
    if name not in RUNTIMES:
        raise UserError(f"no TensorRT is called {name!r}: choose one of {', '.join(RUNTIMES)}")
    title = TITLES[name]
    try:
        module = require(name, _EXTRAS[name], title)
    except MissingDependency as error:
        if name == "tensorrt":  # it does not come from the package index that svdprune comes from
            raise UserError(
                "TensorRT for Python is not installed: on a Jetson, `apt install tensorrt` and a virtual environment "
                "made with --system-site-packages; elsewhere, pip with NVIDIA's own index"
            ) from error
        raise
    except (ImportError, OSError) as error:
        known = explain(error) or f"its import fails ({first_line(str(error))}): install it again"
        raise UserError(f"{title} cannot be used: {known}") from error
    missing = [part for part in _NEEDED if not hasattr(module, part)]
    if missing or not hasattr(module, "__version__"):
        raise UserError(
            f"{title} is only half installed, its Python module has no {(missing or ['version'])[0]}: "
            "install the whole package again (a lean or dispatch package cannot build)"
        )
    found = TensorRt(name, module)
    if name == "tensorrt" and int(re.match(r"\d+", found.version)[0]) < _OLDEST:  # type: ignore[index]
        raise UserError(
            f"TensorRT {found.version} is too old, svdprune needs {_OLDEST} or newer: upgrade it (JetPack 6.2 has 10.3)"
        )
    return found


class TensorRt(Installation):
    """An installed TensorRT that builds engines, one step a method: network, configuration, build."""

    def monitor(self, progress: Progress) -> Any | None:
        """An ``IProgressMonitor`` that keeps ``progress`` up to date; None where the API has none."""
        trt: Any = self.module
        if not hasattr(trt, "IProgressMonitor") or not hasattr(trt.IBuilderConfig, "progress_monitor"):
            return None

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.start(phase_name, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                progress.step(phase_name, step)
                return not progress.cancelled

            def phase_finish(self, phase_name: str) -> None:
                progress.finish(phase_name)

        return Monitor()

    def network_from_onnx(self, path: str | Path, log: BuildLog | None = None) -> Network:
        """Parse an ONNX file, strongly typed; its external data are read from beside it.

        Raises:
            UserError: TensorRT cannot start here, or does not take the graph; the sentence names the first node.
        """
        trt: Any = self.module
        log = BuildLog() if log is None else log
        logger = self.logger(log)
        try:
            builder = trt.Builder(logger)
        except (TypeError, RuntimeError) as error:  # pybind11: "factory function returned nullptr"
            log("ERROR", str(error))
            raise UserError(log.fault(f"starting {self.title}")) from error
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # a must on 10, the only way later
            flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        definition = builder.create_network(flags)
        parser = trt.OnnxParser(definition, logger)
        if not parser.parse_from_file(str(path)):
            raise UserError(self._parser_fault(parser, Path(path), log))
        return Network(builder, definition, parser, logger)

    def _parser_fault(self, parser: Any, path: Path, log: BuildLog) -> str:
        """The first error of a parser, with its node."""
        where, said = "", log.errors
        if parser.num_errors:
            error = parser.get_error(0)
            said = causes([error.desc(), *said])
            node = error.node_name() if hasattr(error, "node_name") else ""
            operator = error.node_operator() if hasattr(error, "node_operator") else ""
            where = f" at node {node} ({operator})" if node or operator else ""
        known = explain("\n".join(said))
        if known:
            return f"{self.title} does not take {path}{where}: {known}"
        first = first_line(said[0]) if said else "no reason was given"
        return f"{self.title} does not take {path}{where} ({first}): export the bundle for a target with this TensorRT"

    def config(
        self,
        network: Network,
        profiles: list[Profile],
        sm: int | None = None,
        workspace: int | None = None,
        level: int | None = None,
        version_compatible: bool = False,
        timings: bytes | None = None,
        monitor: Any | None = None,
    ) -> Any:
        """A builder configuration.

        Args:
            profiles: shapes of the inputs that vary; one profile each.
            sm: the compute capability to build for, where TensorRT takes one; else the GPU of this machine.
            workspace, level, version_compatible: see ``BuildOptions``.
            timings: a serialised timing cache, b"" for an empty one, None for none. One of another GPU or driver is
                left aside.
            monitor: of ``self.monitor``.

        Raises:
            UserError: an option that this TensorRT does not have, or a compute capability that it does not build for.
        """
        trt: Any = self.module
        config = network.builder.create_builder_config()
        # The scorer's products must stay float32: factors of ten bits ruin the choice of tokens (docs/fidelity.md).
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if level is not None:
            config.builder_optimization_level = level
        if version_compatible:
            if not self.needs_gpu or not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
                raise UserError(f"{self.title} builds no version-compatible engines: leave out --version-compatible")
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if sm is not None and not self.needs_gpu:
            self._target(config, sm)
        for shapes in profiles:
            profile = network.builder.create_optimization_profile()
            for name, (least, likely, most) in shapes.items():
                profile.set_shape(name, least, likely, most)
            config.add_optimization_profile(profile)
        if timings is not None:
            cache = config.create_timing_cache(timings)
            if not config.set_timing_cache(cache, ignore_mismatch=False):
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        if monitor is not None:
            config.progress_monitor = monitor
        return config

    def _target(self, config: Any, sm: int) -> None:
        """Build for the compute capability ``sm`` instead of for this machine's."""
        if sm not in self.capabilities:
            raise UserError(self.refusal(sm))
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{sm}"), 0)

    def build(self, network: Network, config: Any, log: BuildLog, progress: Progress, doing: str) -> Any:
        """Build the engine, in the calling thread.

        Returns:
            The serialised engine: an object with the buffer protocol and ``nbytes``, so that no copy is made. None when
            ``progress.cancelled`` stopped it.

        Raises:
            SvdpruneError: the build failed.
        """
        try:
            data = network.builder.build_serialized_network(network.definition, config)
        except (RuntimeError, MemoryError) as error:
            log("ERROR", str(error) or type(error).__name__)
            raise SvdpruneError(log.fault(doing)) from error
        if data is None and not progress.cancelled:
            raise SvdpruneError(log.fault(doing))
        return None if progress.cancelled else data

    def timings_of(self, config: Any) -> bytes:
        """The timing cache after a build, serialised."""
        cache = config.get_timing_cache()
        return b"" if cache is None else bytes(cache.serialize())
