"""Find an engine in a bundle, map its file, check that its inputs and outputs are what the runtime feeds and reads."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.engines.adapter import find_tensorrt
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.session import EngineSession
from svdprune.runtime.engines.store import find_engine
from svdprune.runtime.errors import BundleError

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}  # svdprune's extra that brings the CUDA binding


@dataclass(frozen=True)
class EngineData:
    """A serialised engine and what it runs on.

    Attributes:
        trt: the library.
        device: the GPU.
        data: the engine, mapped from its file: not read into memory a second time beside TensorRT's own copy.
        where: its path.
        host_code: it may hold code for the CPU (version-compatible engines do).
    """

    trt: Installation
    device: Device
    data: Any
    where: str
    host_code: bool


@contextmanager
def open_engine(
    bundle: Bundle, part: str, name: str, device: Device | None = None, verify: bool = True
) -> Iterator[EngineData]:
    """The engine of a bundle's part for this machine; in the block, it is deserialised.

    Args:
        part: "vision" or "decoder".
        name: "tensorrt" or "tensorrt_rtx".
        device: an opened GPU to share; None opens one, which is closed here if the block fails, else by its user.
        verify: compare the file's SHA-256 first.

    Raises:
        UserError: TensorRT is missing or too old, there is no GPU, or no engine that fits was built; it says which.
    """
    trt = find_tensorrt(name)
    with ExitStack() as undo:
        if device is None:
            device = Device(_EXTRAS[name])
            undo.callback(device.close)
        found = find_engine(bundle, part, trt, device.sm, verify)
        with found.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            host_code = bool(found.info["key"]["options"].get("version_compatible", False))
            yield EngineData(trt, device, data, str(found.path), host_code)
        undo.pop_all()


def check_tensors(session: EngineSession, wanted: Mapping[str, str | tuple[str, ...]]) -> None:
    """Refuse an engine whose inputs and outputs are others.

    Args:
        session: the engine, opened.
        wanted: NumPy's name of the type of each input and output, or the names it may have.

    Raises:
        BundleError: naming the first that is missing, of another type or too many.
    """
    again = "export the bundle and build the engine again"
    for name, names in wanted.items():
        if name not in session.tensors:
            raise BundleError(f"{session.where} lacks {name}: {again}")
        found, allowed = session.tensors[name].dtype.name, (names,) if isinstance(names, str) else names
        if found not in allowed:
            raise BundleError(f"{session.where} has {name} as {found}, not {' or '.join(allowed)}: {again}")
    other = sorted(set(session.tensors) - set(wanted))
    if other:
        raise BundleError(f"{session.where} has {other[0]}, which is not known: {again}")
