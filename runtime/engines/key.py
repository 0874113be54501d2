"""What an engine is tied to: TensorRT and its version, the GPU's architecture, the graph, the options of the build."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import VisionInfo

PARTS = ("vision", "decoder")
RECIPE = 1  # raised when svdprune builds the same graph with the same options in another way (profiles, flags)
Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, most likely and greatest shape of an input
Profile = dict[str, Sizes]


@dataclass(frozen=True)
class BuildOptions:
    """What the caller of a build may choose; all of it is part of the engine's key.

    Attributes:
        batch: pictures at a time: least, most likely, most.
        workspace: bytes that an operation may take as scratch memory; None leaves it to TensorRT (all of the GPU's).
        level: builder optimisation level, 0 (quick to build) to 5 (quick to run); None is TensorRT's default, 3.
        version_compatible: the engine also loads in later TensorRT releases of the same major version.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    workspace: int | None = None
    level: int | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        least, likely, most = self.batch
        if not 1 <= least <= likely <= most:
            raise UserError(f"--batch is {least},{likely},{most}, it must be three rising numbers of 1 or more")
        if least != 1:
            raise UserError(
                f"--batch starts at {least}, it must start at 1: pictures come one at a time, in the self-test too"
            )
        if self.level is not None and not 0 <= self.level <= 5:
            raise UserError(f"--level is {self.level}, it must be between 0 and 5")
        if self.workspace is not None and self.workspace < 1:
            raise UserError("--workspace must be more than 0 GiB")

    def of_part(self, part: str) -> dict[str, Any]:
        """The options as JSON for the key; a part has only those that change it."""
        options: dict[str, Any] = {"batch": list(self.batch)} if part == "vision" else {}
        options |= {"workspace": self.workspace, "level": self.level}
        return options | {"version_compatible": self.version_compatible, "recipe": RECIPE}


def batch_of(vision: VisionInfo, options: BuildOptions) -> tuple[int, int, int]:
    """What the vision engine encodes at once, least, most likely and most: pictures, or the tiles of one.

    Raises:
        UserError: several pictures of a bundle that cuts a picture into tiles.
    """
    if vision.tiles is None:
        return options.batch
    if options.batch[2] != 1:
        raise UserError(
            f"--batch is {','.join(map(str, options.batch))} and this bundle's graph takes the tiles of one picture: "
            "leave --batch out"
        )
    return vision.tiles.least, vision.tiles.likely, vision.tiles.most


@dataclass(frozen=True)
class EngineKey:
    """The identity of an engine.

    Attributes:
        runtime: "tensorrt" or "tensorrt_rtx".
        version: of that TensorRT ("10.3.0").
        sm: compute capability times ten; None where an engine fits several (TensorRT-RTX without a named target).
        graph: SHA-256 over the graph's file and its external data.
        options: of the build, JSON values.
    """

    runtime: str
    version: str
    sm: int | None
    graph: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The engine's folder under ``engines/``: readable, then a digest of the graph and the options."""
        said = json.dumps([self.graph, self.options], sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return f"{self.runtime}-{self.version}-{'any' if self.sm is None else f'sm{self.sm}'}-{digest}"


def graph_files(bundle: Bundle, part: str) -> list[str]:
    """Names of the files that a part's graph is made of, the .onnx first.

    External data are every ``.data`` file of the graph's folder: which of them a graph refers to is written inside it,
    and reading that needs a package that a device does not have. One too many costs a rebuild, one too few would let an
    engine of another graph pass.

    Raises:
        UserError: the bundle has no graph that an engine of this part could be built from.
    """
    manifest = bundle.manifest
    if part == "vision":
        graph = manifest.vision.file
    elif manifest.decoder.engine is not None:
        graph = manifest.decoder.engine.file
    else:
        reason = manifest.decoder.engine_refused or "it was exported without one"
        raise UserError(
            f"the bundle has no decoder graph for engines ({reason}): build the vision engine alone (--part vision), "
            "which is chained to the ONNX Runtime decoder"
        )
    folder = PurePosixPath(graph).parent
    data = [name for name in sorted(manifest.files) if name.endswith(".data") and PurePosixPath(name).parent == folder]
    return [graph, *data]


def graph_digest(bundle: Bundle, part: str) -> str:
    """SHA-256 over the names and hashes of a part's graph files, as the manifest has them."""
    digest = hashlib.sha256()
    for name in graph_files(bundle, part):
        digest.update(f"{PurePosixPath(name).name} {bundle.manifest.files[name].sha256}\n".encode())
    return digest.hexdigest()


def graph_bytes(bundle: Bundle, part: str) -> int:
    """Size of a part's graph with its own external data (``<graph>.data``)."""
    graph, *data = graph_files(bundle, part)
    own = [name for name in data if name == f"{graph}.data"] or data
    return sum(bundle.manifest.files[name].size for name in (graph, *own))
