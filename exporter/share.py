"""A decoder that two bundles of one model share: written once, found in both by hard links."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path, PurePosixPath

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder.engine_choice import EnginePlan
from svdprune.runtime.bundle_reader import Bundle, open_bundle
from svdprune.runtime.bundle_writer import BundleWriter
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderInfo

_INSTEAD = "leave out --share-decoder-with, or"


def open_shared(path: Path, out: Path, checkpoint: Checkpoint, precision: str) -> Bundle:
    """The bundle whose decoder an export into the folder `out` shall share, when it would write the very same files.

    Presence and sizes of its files are checked here, before any work; hashes when they are linked.

    Raises:
        BundleError: `path` is no bundle, or it is damaged.
        UserError: it is of other weights, another precision or another release of svdprune, or it lies on another file
            system.
    """
    other = open_bundle(path, verify=False)
    decoder, version = other.manifest.decoder, importlib.metadata.version("svdprune")
    if other.manifest.model.sha256 != checkpoint.fingerprint():
        raise UserError(
            f"the decoder of {path} was made from other weights ({other.manifest.model.id}): {_INSTEAD} name a bundle "
            "of this checkpoint"
        )
    if decoder.precision != precision:
        raise UserError(
            f"the decoder of {path} is {decoder.precision}, not {precision}: {_INSTEAD} give "
            f"--decoder-precision {decoder.precision}"
        )
    written = other.manifest.written_by.get("svdprune")
    if written != version:
        raise UserError(
            f"the decoder of {path} was written by svdprune {written}, this is {version}: {_INSTEAD} export that "
            "bundle again"
        )
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    if place.stat().st_dev != path.stat().st_dev:
        raise UserError(
            f"{path} and {place} are on two file systems and cannot share a file: {_INSTEAD} export beside that bundle"
        )
    return other


def check_engine_graph(other: Bundle, plan: EnginePlan) -> None:
    """Refuse a bundle that has not the decoder graph for engines that is planned.

    Raises:
        UserError: it has none, or one with another KV cache.
    """
    rows = other.manifest.decoder.engine.cache if other.manifest.decoder.engine else None
    if plan.cache is None or rows == plan.cache:
        return
    has, remedy = "no decoder graph for engines", "give --decoder-engine none"
    if rows is not None:
        has, remedy = f"a decoder graph for engines with {rows} cache rows", f"give --cache {rows}"
    raise UserError(f"{other.path} has {has}, this export wants one with {plan.cache}: {_INSTEAD} {remedy}")


def share_decoder(other: Bundle, bundle: BundleWriter, plan: EnginePlan) -> DecoderInfo:
    """Link the decoder's files of `other`, which `open_shared` gave and `check_engine_graph` passed.

    Returns:
        The manifest's entry.

    Raises:
        BundleError: a file of it was changed since it was written.
        UserError: no link can be made there.
    """
    decoder = other.manifest.decoder
    engine = decoder.engine.file if decoder.engine else None
    folder = PurePosixPath(decoder.file).parent
    for name in other.manifest.files:
        of_engine = engine is not None and name.startswith(engine)  # the graph, and its weights in a file beside it
        if PurePosixPath(name).parent == folder and (plan.cache is not None or not of_engine):
            bundle.link(name, other)
    return dataclasses.replace(
        decoder, engine=decoder.engine if plan.cache is not None else None, engine_refused=plan.note
    )
