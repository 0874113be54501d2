"""The sections that list: engines, every setting, files and versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.cli.show import human_bytes
from svdprune.runtime.engines.installation import TITLES
from svdprune.runtime.engines.key import graph_digest
from svdprune.runtime.engines.store import EngineFile, list_engines
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import Manifest
from svdprune.runtime.report.parts import NONE, Section, Table
from svdprune.runtime.targets import TARGETS

_ELSEWHERE = ("quantisation", "files", "written_by")  # fields of the manifest that have a section of their own


def engines_section(bundle: Bundle) -> Section:
    """Engines that were built in the bundle's folder."""
    name, title = "engines", "Engines built"
    engines = list_engines(bundle)
    if not engines:
        target = TARGETS.get(bundle.manifest.target)
        if target is not None and not target.releases:
            text = f"None: `{bundle.manifest.target}` runs the graphs by ONNX Runtime, without an engine."
        else:
            text = "None yet: `svdprune build BUNDLE` on the device makes them, then `svdprune report BUNDLE`."
        return Section(name, title, [text])
    columns = ("engine", "built by", "for", "size", "build", "layers", "state", "self-test", "built", "folder")
    rows = [_engine_row(bundle, engine) for engine in engines]
    table = Table("Engines in the bundle's folder", columns, rows, words=(1, 2, 6, 7, 8, 9))
    return Section(name, title, tables=[table])


def _engine_row(bundle: Bundle, engine: EngineFile) -> tuple[str, ...]:
    """What ``build.json`` says, which may lack any field; and whether the file is whole."""
    info, key = engine.info, engine.key
    seconds = info.get("seconds")
    try:
        engine.check(verify=False)
        state = "ok" if key.graph == graph_digest(bundle, engine.part) else "stale: of another graph"
    except UserError as error:
        state = str(error)
    return (
        engine.part,
        f"{TITLES.get(key.runtime, key.runtime)} {key.version}",
        f"{info.get('target', NONE)}, sm {key.sm}",
        human_bytes(info["bytes"]) if isinstance(info["bytes"], int) else NONE,
        f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else NONE,
        str(info.get("layers") or NONE),
        state,
        str(info.get("selftest", NONE)),
        str(info.get("built", NONE)),
        engine.path.parent.name,
    )


def settings_section(manifest: Manifest, licence: str | None) -> Section:
    """Every field of the manifest."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, value in _flat(dataclasses.asdict(manifest)):
        head, _, rest = path.partition(".")
        groups.setdefault(head if rest else "bundle", []).append((rest or head, value))
    said = licence or "not known: the checkpoint names none, so ask where the weights come from"
    groups["model"].append(("licence of the weights", said))
    tables = [Table(_TITLES.get(name, name), ("setting", "value"), rows, words=(1,)) for name, rows in groups.items()]
    tables.sort(key=lambda table: table.caption != "Bundle")
    return Section("settings", "Every setting", ["All of `manifest.json`."], tables=tables)


_TITLES = {
    "bundle": "Bundle",
    "model": "Model",
    "vision": "Vision graph and selection",
    "decoder": "Decoder",
    "processor": "Text and pictures",
    "golden": "Golden case",
    "calibration": "Calibration",
}


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as (dotted name, value as words)."""
    found: list[tuple[str, str]] = []
    for name, value in content.items():
        if name in _ELSEWHERE:
            continue
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", _words(value)))
    return found


def _words(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def files_section(bundle: Bundle, page: str) -> Section:
    """Files of the bundle, without this page, and what wrote them."""
    manifest = bundle.manifest
    rows = [(name, human_bytes(info.size)) for name, info in sorted(manifest.files.items()) if name != page]
    versions = sorted(manifest.written_by.items())
    tables = [
        Table("Files, beside this page and `manifest.json`, which has the SHA-256 of each", ("file", "size"), rows),
        Table("Versions that wrote the bundle", ("package", "version"), versions, words=(1,)),
    ]
    return Section("files", "Files and versions", tables=tables)
