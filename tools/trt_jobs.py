"""What `tools/trt_commands.py` runs: a bundle's graphs with their optimisation profiles and golden inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdprune.runtime.arrays import host_rows, row_count
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.decoder import graph_positions, more_inputs, row_shapes
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.engines.build import profiles_of
from svdprune.runtime.engines.key import BuildOptions, Profile
from svdprune.runtime.errors import UserError
from svdprune.runtime.positions import policy_named
from svdprune.runtime.preprocess import ImageSettings, normalise, open_image, preprocess
from svdprune.runtime.prompt import Run, layout_of, run_of
from svdprune.runtime.verify_golden import read_golden
from svdprune.runtime.verify_metrics import VISION_LIMITS, limits_for

LOADER = '''"""Inputs of the golden case for `polygraphy run --data-loader-script`; by tools/trt_commands.py."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def load_data():
    """The same input {runs} times: the times of runs are averaged."""
    inputs = {{name: np.load(HERE / f"{{name}}.npy") for name in {names}}}
    inputs |= {{name: np.zeros(shape, np.{dtype}) for name, shape in {empty}.items()}}  # an empty KV cache
    for _ in range({runs}):
        yield inputs
'''


@dataclass(frozen=True)
class Job:
    """One engine in one use.

    Attributes:
        name: of its files ("vision", "decoder-prefill").
        title: for a person.
        graph: the ONNX file.
        profiles: optimisation profiles; ``profile`` is the one in use.
        inputs: real inputs by name.
        empty: shapes of inputs that start as zeros, of ``dtype``: the KV cache.
        cosine: least cosine with ONNX Runtime; None where that does not run the graph.
        notes: what to know before trusting a figure.
    """

    name: str
    title: str
    graph: Path
    profiles: list[Profile]
    profile: int
    inputs: Mapping[str, np.ndarray]
    empty: Mapping[str, tuple[int, ...]]
    dtype: str
    cosine: float | None
    notes: tuple[str, ...] = ()


def jobs_of(bundle: Bundle, part: str, batch: int) -> list[Job]:
    """What there is to run: the vision graph once, the decoder's engine graph for prefill and for a decoding step.

    Raises:
        UserError: the bundle has no such graph.
    """
    return [_vision(bundle, batch)] if part == "vision" else _decoder(bundle)


def _vision(bundle: Bundle, batch: int) -> Job:
    info, golden = bundle.manifest.vision, read_golden(bundle)
    name = bundle.manifest.processor.image
    settings = ImageSettings.from_json(bundle.read_json(name), name)
    pixels = preprocess(open_image(golden.picture), settings)
    feed = np.ascontiguousarray(pixels if info.input == "uint8" else normalise(pixels, settings))
    shapes = profiles_of(bundle, "vision", BuildOptions((1, 1, batch)), {"pixels": (-1, *feed.shape)})
    cosine = limits_for(VISION_LIMITS, info.precision).cosine
    return Job(
        "vision",
        "vision graph, one picture",
        bundle.file(info.file),
        shapes,
        0,
        {"pixels": feed[None]},
        {},
        "float32",
        cosine,
    )


def _decoder(bundle: Bundle) -> list[Job]:
    info, golden = bundle.manifest.decoder, read_golden(bundle)
    if info.engine is None:
        reason = info.engine_refused or "it was exported without one"
        raise UserError(f"{bundle.path} has no decoder graph for engines ({reason}): ask for --part vision")
    embed = Embedding(bundle.file(info.embedding), info.vocab, info.hidden, info.embed_scale)
    ids, pictures = golden.prompt_ids, [golden.pictured]
    layout = layout_of(ids, pictures, policy_named(golden.positions), info, bundle.manifest.processor.image_token_id)
    prompt = run_of(layout, ids, 0, pictures, embed)
    step = Run(embed(golden.answer_ids[:1] or [info.eos[0]]), layout.span(len(ids), len(ids) + 1))
    profiles = profiles_of(bundle, "decoder", BuildOptions(), row_shapes(info))
    cache = (1, info.kv_heads, info.engine.cache, info.head_dim)
    empty = {f"past.{i}.{end}": cache for i in range(info.layers) for end in ("key", "value")}
    notes = (
        "The graph updates its cache in place: each present.* wants the memory of its past.*, which svdprune binds so.",
        "Whether these tools do depends on their release and was not tried. Needs TensorRT 10.15 or newer.",
    )
    jobs = []
    count = row_count(prompt.embeds)
    for index, (name, title, run, written) in enumerate(
        (
            ("prefill", f"prefill of the golden prompt, {count} rows", prompt, 0),
            ("decode", "one decoding step after it", step, count),
        )
    ):
        rows = host_rows(run.embeds)
        inputs = {
            "inputs_embeds": np.ascontiguousarray(rows[None], np.float32),
            "position_ids": graph_positions(run.positions),
            **more_inputs(info, len(rows), run.deepstack, run.groups),
            "write_index": np.array([written], np.int64),
        }
        dtype = {"fp16": "float16", "fp32": "float32"}[info.engine.precision]
        graph = bundle.file(info.engine.file)
        jobs.append(
            Job(f"decoder-{name}", f"decoder, {title}", graph, profiles, index, inputs, empty, dtype, None, notes)
        )
    return jobs


def write_inputs(job: Job, folder: Path, runs: int) -> None:
    """Write a job's inputs into ``folder/<name>``: .npy and a loader for Polygraphy, raw .bin for trtexec."""
    place = folder / job.name
    place.mkdir(parents=True, exist_ok=True)
    for name, array in job.inputs.items():
        np.save(place / f"{name}.npy", array)
        array.tofile(place / f"{name}.bin")
    text = LOADER.format(runs=runs, names=tuple(job.inputs), empty=dict(job.empty), dtype=job.dtype)
    (place / "load.py").write_text(text, encoding="utf-8")
