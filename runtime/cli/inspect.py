"""``svdprune inspect``: what a bundle holds."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.show import human_bytes, print_json, print_table, quantisation_facts
from svdprune.runtime.engines.installation import TITLES
from svdprune.runtime.errors import UserError

_GRAFTS = ("scorer", "projector")  # what the exporter joins to the traced encoder names its nodes "<part>/..."


@click.command("inspect", cls=Command, short_help="What a bundle holds.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(bundle: Path, as_json: bool) -> None:
    """Say what BUNDLE holds: the model, the selection, precisions, files, sizes and the engines that were built.

    Every file's hash is checked.
    """
    from svdprune.runtime.bundle import open_bundle
    from svdprune.runtime.bundle_reader import shared_files

    opened = open_bundle(bundle)
    manifest, shared = opened.manifest, shared_files(opened)
    nodes = _nodes_by_part(opened.file(manifest.vision.file))
    if as_json:
        facts = dataclasses.asdict(manifest)
        links = {name: [str(folder) for folder in folders] for name, folders in shared.items()}
        print_json(
            {"bundle": str(bundle), **facts, "vision_nodes": nodes, "engines": _engines(opened), "shared": links}
        )
        return
    print_table(("", str(bundle)), [*_facts(manifest, nodes), *_shared_facts(opened, shared)])
    sizes = [(name, human_bytes(info.size), info.sha256[:12]) for name, info in sorted(manifest.files.items())]
    total = human_bytes(sum(info.size for info in manifest.files.values()))
    print_table(("file", "size", "sha256"), [*sizes, ("all", total, "")])
    engines = _engines(opened)
    if engines:
        columns = ("engine", "built by", "for", "size", "build", "layers", "state", "self-test", "folder")
        print_table(columns, [_engine_row(engine) for engine in engines])


def _engines(bundle: Any) -> list[dict[str, Any]]:
    """What each engine's ``build.json`` says, its folder, and whether it is whole and of this bundle's graph."""
    from svdprune.runtime.engines.key import graph_digest
    from svdprune.runtime.engines.store import list_engines

    found = []
    for engine in list_engines(bundle):
        state = "ok"
        try:
            if engine.key.graph != graph_digest(bundle, engine.part):
                state = "stale: of another graph"
            engine.check()
        except UserError as error:
            state = str(error)
        found.append({"folder": engine.path.parent.name, "state": state, **engine.info})
    return found


def _engine_row(engine: dict[str, Any]) -> tuple[str, ...]:
    key = engine["key"]
    return (
        engine["part"],
        f"{TITLES[key['runtime']]} {key['version']}",
        f"{engine['target']}, sm {key['sm']}",
        human_bytes(engine["bytes"]),
        f"{engine['seconds']:.1f} s",
        "-" if engine["layers"] is None else str(engine["layers"]),
        engine["state"],
        engine["selftest"],
        engine["folder"],
    )


def _facts(manifest: Any, nodes: dict[str, int] | None) -> list[tuple[str, str]]:
    """The manifest as lines for a person."""
    model, vision, decoder = manifest.model, manifest.vision, manifest.decoder
    selector = {
        name: value
        for name, value in dataclasses.asdict(vision.selector).items()
        if name != "name" and value is not None and value is not False
    }
    defaults = dataclasses.asdict(decoder.generation)
    parts = "onnx is not installed, so the graph was not opened"
    if nodes is not None:
        parts = f"{sum(nodes.values())}: " + ", ".join(f"{part} {count}" for part, count in nodes.items())
    calibrated = [file for file in vars(manifest.calibration).values() if file] if manifest.calibration else []
    return [
        ("model", f"{model.id} ({model.family})" + (f", revision {model.revision}" if model.revision else "")),
        ("target", manifest.target),
        ("vision tokens", _tokens(vision)),
        ("selector", vision.selector.name + _in_brackets(selector)),
        *([("calibration", ", ".join(calibrated))] if calibrated else []),
        ("positions", manifest.positions),
        (
            "tile" if vision.tiles else "picture",
            f"{vision.height} x {vision.width} {vision.input}, {vision.grid[0]} x {vision.grid[1]} patches",
        ),
        *(tile_facts(vision.tiles) if vision.tiles else []),
        ("vision graph", f"{vision.precision}, opset {vision.opset}"),
        *(quantisation_facts(vision.quantisation) if vision.quantisation else []),
        *([("DeepStack", f"{vision.deepstack} levels beside the features")] if vision.deepstack else []),
        ("selects on", f"hidden state {vision.tap}, {vision.channels} channels"),
        ("vision nodes", parts),
        (
            "decoder",
            f"{decoder.precision}, {decoder.layers} layers, {decoder.hidden} wide, vocabulary {decoder.vocab:,}, "
            f"context {decoder.context:,}",
        ),
        ("decoder for engines", _decoder_for_engines(decoder)),
        ("generation", ", ".join(f"{name} {value}" for name, value in defaults.items())),
        ("written by", ", ".join(f"{name} {version}" for name, version in manifest.written_by.items())),
    ]


def _shared_facts(bundle: Any, shared: dict[str, list[Path]]) -> list[tuple[str, str]]:
    """Which files are on the disk once for several bundles, as lines for a person."""
    sharers: dict[tuple[str, ...], list[str]] = {}
    for name, folders in shared.items():
        others = tuple(folder.name for folder in folders) or ("a folder that is not beside this one",)
        sharers.setdefault(others, []).append(name)
    return [
        (
            "shared",
            f"{human_bytes(sum(bundle.manifest.files[name].size for name in names))} on the disk once with "
            f"{', '.join(others)}: {', '.join(names)}",
        )
        for others, names in sharers.items()
    ]


def _tokens(vision: Any) -> str:
    if vision.tiles is None:
        return f"{vision.tokens} -> {vision.keep} ({vision.keep / vision.tokens:.1%})"
    of = {"picture": "the whole picture", "tile": "each tile"}.get(
        vision.tiles.budget, f"up to {vision.tiles.pictures} pictures together"
    )
    return f"up to {vision.tokens} -> {vision.keep} of {of}, or as many as there are"


def tile_facts(tiles: Any) -> list[tuple[str, str]]:
    """How a picture is cut, as lines for a person."""
    of = "a picture" if tiles.budget != "prompt" else f"a prompt of up to {tiles.pictures} pictures"
    each = "1 token" if tiles.per_tile == 1 else f"{tiles.per_tile} tokens"
    return [("tiles", f"{tiles.least} to {tiles.most} {of} (likely {tiles.likely}), {each} each")]


def _decoder_for_engines(decoder: Any) -> str:
    """The graph that engines are built from, and what cannot build them."""
    graph, parts = decoder.engine, [decoder.engine_refused]
    if graph:
        parts.insert(0, f"{graph.precision}, opset {graph.opset}, KV cache of {graph.cache:,} rows")
    return "; ".join(filter(None, parts)) or "none"


def _in_brackets(fields: dict[str, Any]) -> str:
    return " (" + ", ".join(f"{name} {value}" for name, value in fields.items()) + ")" if fields else ""


def _nodes_by_part(path: Path) -> dict[str, int] | None:
    """Nodes of the vision graph by part, None where onnx is not installed; the weights are not read."""
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    graph = onnx.load(str(path), load_external_data=False).graph
    prefixes = (node.name.partition("/")[0] for node in graph.node)
    return dict(collections.Counter(prefix if prefix in _GRAFTS else "encoder and selection" for prefix in prefixes))
