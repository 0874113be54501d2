"""Bundles, profiles and facts for the tests of the report."""

from __future__ import annotations

import dataclasses
import shutil

import tiny

from svdprune.runtime.bundle import open_bundle, write_bundle
from svdprune.runtime.profile.layers import Layer, LayerTable
from svdprune.runtime.profile.report import Arm, ProfileReport, Where, ratios
from svdprune.runtime.profile.stats import Summary
from svdprune.runtime.report.facts import Elsewhere, Energy, Estimated, EstimatedCase, EstimatedStage, Facts


def again(source, path, put=None, **changes):
    """The bundle once more, with fields of the manifest changed and files added."""
    opened = open_bundle(source)
    with write_bundle(path) as writer:
        for name in opened.manifest.files:
            shutil.copy(source / name, writer.file(name))
        for name, content in (put or {}).items():
            writer.file(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        writer.manifest = dataclasses.replace(opened.manifest, **changes)
    return open_bundle(path)


def profile_of(right, **changes) -> ProfileReport:
    """A profile as the profiler gives it."""
    once = Summary(0.012, 0.013, 0.014, 20)
    stages = dict.fromkeys(("preprocess", "vision", "prefill", "decode", "first_token", "total"), once)
    layers = LayerTable(
        "ONNX Runtime", [Layer("select/TopK", "TopK", "selection", 1e-4, 1.0)], {"selection": once}, {}, 3
    )
    slow = {name: Summary(0.036, 0.04, 0.05, 20) for name in stages}
    pruned = Arm("pruned", tiny.KEEP, 9, stages | {"selection": once}, layers, ["a remark"])
    whole = Arm("unpruned", tiny.TOKENS, 21, slow)
    info = open_bundle(right).manifest
    fields = {
        "bundle": "b", "model": info.model.id, "target": info.target, "vision": "onnxruntime",
        "vision_precision": info.vision.precision, "decoder": "onnxruntime", "decoder_precision": "fp32", "image": "i",
        "question": "q", "tokens": tiny.TOKENS, "runs": 20, "warm_up": 3, "new_tokens": 16,
        "where": Where("GPU", "Orin <b>", 12, None, None, {"Python": "3.10"}), "pruned": pruned, "unpruned": whole,
        "ratios": ratios(pruned, whole),
    }  # fmt: skip
    return ProfileReport(**(fields | changes))


def facts_of() -> Facts:
    """Every part there, as an export for a GPU gives it."""

    def case(tokens: int) -> EstimatedCase:
        stages = [EstimatedStage("vision", 1e9, 2e6, 0.003, "compute"), EstimatedStage("selection", 0, 0, 0.0, "none")]
        return EstimatedCase(tokens, stages, 0.003 * tokens, 0.01, {"KV cache": 100 * tokens}, 100 * tokens, True)

    curve = [0.5, 0.8, 0.95, 0.999, 1.0]
    return Facts(
        energy=[Energy(False, curve, 4, "folder"), Energy(True, curve, 4, "folder")],
        estimate=Estimated(
            "a roofline model, not a measurement", "jetson-orin", "AGX Orin", "fp16", "fp16", 64, 64,
            case(4), case(16), 10**10, ["a note of the model"],
        ),
        elsewhere=[Elsewhere("rtx-40", "RTX 4090", "fp16", 0.001, 0.004, 10**6, None)],
        licence="apache-2.0 (the model card)",
    )  # fmt: skip
