"""Engines in a bundle: ``engines/<key>/<part>.engine`` with ``build.json`` beside it, put there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdprune.runtime.bundle import Bundle, sha256_of
from svdprune.runtime.engines.installation import TITLES, Installation
from svdprune.runtime.engines.key import EngineKey, graph_digest
from svdprune.runtime.errors import UserError

ENGINES, BUILD = "engines", "build.json"
SCHEMA = 1
PASSED = "passed"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk: its file, and what ``build.json`` says of it."""

    path: Path
    info: dict[str, Any]

    @property
    def key(self) -> EngineKey:
        """What the engine is tied to."""
        return EngineKey(**self.info["key"])

    @property
    def part(self) -> str:
        """ "vision" or "decoder"."""
        return str(self.info["part"])

    @property
    def selftest(self) -> str:
        """ "passed", or why it was not run."""
        return str(self.info["selftest"])

    def check(self, verify: bool = True) -> None:
        """Compare the file with what was written.

        Args:
            verify: its SHA-256 too, which reads all of it; the size alone otherwise.

        Raises:
            UserError: truncated, changed or unreadable.
        """
        again = "run `svdprune build` again"
        try:
            size = self.path.stat().st_size
            if size != self.info["bytes"]:
                raise UserError(f"{self.path} is truncated: it has {size:,} of {self.info['bytes']:,} bytes: {again}")
            if verify and sha256_of(self.path) != self.info["sha256"]:
                raise UserError(f"{self.path} was changed since it was built (its SHA-256 differs): {again}")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): {again}") from error


def list_engines(bundle: Bundle) -> list[EngineFile]:
    """Every engine in the bundle, by folder name; a folder whose ``build.json`` is missing or damaged is not one."""
    found = []
    for note in sorted((bundle.path / ENGINES).glob(f"*/{BUILD}")):
        try:
            info = json.loads(note.read_text(encoding="utf-8"))
            file = EngineFile(note.parent / f"{info['part']}.engine", info)
            if info["schema"] == SCHEMA and file.key.folder == note.parent.name and {*info} >= {"bytes", "sha256"}:
                found.append(file)
        except (OSError, ValueError, KeyError, TypeError):  # not written by a build that ended well
            continue
    return found


def find_engine(bundle: Bundle, part: str, runtime: Installation, sm: int | None, verify: bool = True) -> EngineFile:
    """The engine of ``part`` that ``runtime`` can run on a GPU of ``sm``; of several, the one built last.

    Args:
        runtime: the TensorRT that will run it (``find_tensorrt``).
        sm: the GPU's compute capability times ten; None when it is not known, which takes any.
        verify: compare its SHA-256 too.

    Raises:
        UserError: there is none: it was never built, or is of another graph, TensorRT or GPU (all said), or truncated.
    """
    graph = graph_digest(bundle, part)
    built = [file for file in list_engines(bundle) if file.part == part and file.key.runtime == runtime.name]
    misfits = {file.path: _misfit(file, runtime, sm, graph) for file in built}
    fitting = [file for file in built if not misfits[file.path]]
    if fitting:
        chosen = max(fitting, key=lambda file: str(file.info.get("built", "")))
        chosen.check(verify)
        return chosen
    command = f"run `svdprune build {bundle.path} --runtime {runtime.name}` on this machine"
    if built:
        near = min(built, key=lambda file: len(misfits[file.path]))
        reason = " and ".join(misfits[near.path])
        raise UserError(f"the {part} engine in {near.path.parent} is stale, it is of {reason}: {command}")
    others = sorted({TITLES[file.key.runtime] for file in list_engines(bundle) if file.part == part})
    has = f" (it has one for {others[0]})" if others else ""
    raise UserError(f"{bundle.path} has no {part} engine for {TITLES[runtime.name]}{has}: {command}")


def _misfit(file: EngineFile, runtime: Installation, sm: int | None, graph: str) -> list[str]:
    """What keeps an engine from running here, in words; empty when nothing does."""
    key, reasons = file.key, []
    if key.graph != graph:
        reasons.append("another graph than this bundle's")
    if key.version != runtime.version and not _compatible(key, runtime.version):
        reasons.append(f"{TITLES[key.runtime]} {key.version} (this is {runtime.version})")
    if None not in (sm, key.sm) and key.sm != sm:
        reasons.append(f"a GPU of sm {key.sm} (this is sm {sm})")
    return reasons


def _compatible(key: EngineKey, version: str) -> bool:
    """Whether a version-compatible engine runs in a later release of the same major version."""
    theirs, ours = ([int(part) for part in re.findall(r"\d+", text)] for text in (key.version, version))
    return bool(key.options.get("version_compatible")) and theirs[0] == ours[0] and theirs <= ours


def prepare_store(bundle: Bundle, need: int) -> Path:
    """The bundle's folder of engines, made and tried, before a long build.

    Raises:
        UserError: the bundle is read-only, or its disk has less than ``need`` bytes free.
    """
    folder = bundle.path / ENGINES
    try:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.partial-*"):  # of a build that was killed outright
            process = left.name.rpartition("-")[2]
            if process.isdigit() and not _alive(int(process)):
                shutil.rmtree(left, ignore_errors=True)
        trial = folder / f".trial-{os.getpid()}"
        trial.write_bytes(b"")
        trial.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}), and engines are kept inside the bundle: copy it to "
            "another place"
        ) from error
    if free < need:
        room = f"{free / 1e9:.2f} GB free and the engine needs about {need / 1e9:.2f} GB"
        raise UserError(f"the disk of {folder} has {room}: make room")
    return folder


def put_engine(bundle: Bundle, part: str, key: EngineKey, data: Any, info: dict[str, Any]) -> EngineFile:
    """Write an engine and its ``build.json`` beside their place, and rename; an engine of the same key is replaced.

    Args:
        data: the serialised engine, any object with the buffer protocol.
        info: what else ``build.json`` says; the key, the part, the size and the hash are added.

    Raises:
        UserError: the disk is full or the folder cannot be written. Nothing half-written stays.
    """
    folder = bundle.path / ENGINES
    place, partial = folder / key.folder, folder / f".{key.folder}.partial-{os.getpid()}"
    view = memoryview(data).cast("B")
    digest = hashlib.sha256()
    try:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / f"{part}.engine").open("wb") as stream:
                for start in range(0, view.nbytes, _CHUNK):
                    digest.update(view[start : start + _CHUNK])
                    stream.write(view[start : start + _CHUNK])
                stream.flush()
                os.fsync(stream.fileno())
            said = {"schema": SCHEMA, "part": part, "key": _plain(key), "bytes": view.nbytes}
            said |= {"sha256": digest.hexdigest()} | info
            _write_json(partial / BUILD, said)
            if place.exists():
                shutil.rmtree(place)
            os.rename(partial, place)
        except OSError as error:
            size = f"{view.nbytes / 1e9:.2f} GB"
            raise UserError(f"the engine, {size}, cannot be kept in {place} ({error.strerror}): make room") from error
    except BaseException:  # Ctrl-C too: a partial engine never stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return EngineFile(place / f"{part}.engine", said)


def note_engine(file: EngineFile, **changes: Any) -> EngineFile:
    """The engine with changed fields in its ``build.json``."""
    info = {**file.info, **changes}
    beside = file.path.parent / f".{BUILD}.partial-{os.getpid()}"
    try:
        _write_json(beside, info)
        os.replace(beside, file.path.parent / BUILD)
    except OSError as error:
        raise UserError(f"{file.path.parent} cannot be written ({error.strerror})") from error
    finally:
        beside.unlink(missing_ok=True)
    return EngineFile(file.path, info)


def drop_engine(file: EngineFile) -> None:
    """Remove an engine with its folder; the note goes first, so that half of it is never taken for an engine."""
    try:
        (file.path.parent / BUILD).unlink(missing_ok=True)
        shutil.rmtree(file.path.parent)
    except OSError as error:
        raise UserError(f"{file.path.parent} cannot be removed ({error.strerror}): remove it by hand") from error


def timing_cache(bundle: Bundle, runtime: Installation, sm: int | None) -> Path:
    """Where the timings of a TensorRT, its version and a GPU are kept between builds."""
    return bundle.path / ENGINES / f"timing-{runtime.name}-{runtime.version}-sm{sm}.cache"


def write_beside(place: Path, data: bytes) -> None:
    """Write a small file beside its place and rename it."""
    beside = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def _plain(key: EngineKey) -> dict[str, Any]:
    return {name: getattr(key, name) for name in ("runtime", "version", "sm", "graph", "options")}


def _write_json(place: Path, content: dict[str, Any]) -> None:
    place.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _alive(process: int) -> bool:
    """Whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
