"""The decoders of the newer families, both spellings, against transformers: positions of three axes, DeepStack, groups.

Each is given a prompt with a picture, decodes, is given text, decodes, a second picture, decodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporter.decoder_models import load
from tests.exporter.static_models import load_static
from tests.exporter.text_models import MODELS, Reference, Run, make_text, play, runs

CACHE = 72


def open_graph(spelling: str, folder: Path, reference: Reference, precision: str = "fp32") -> Any:
    if spelling == "static":
        return load_static(folder, precision, CACHE, **reference.text.export)
    return load(folder, precision, **reference.text.export)


def table_of(reference: Reference) -> np.ndarray:
    """The embeddings as transformers gives them: scaled where the model scales them."""
    embedding = reference.model.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    rows: np.ndarray = embedding.weight.detach().numpy() * np.float32(scale)
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = make_text(name, tmp_path)
    given, table = runs(reference), table_of(reference)
    expected, logits = play(reference, given, table)
    for spelling in ("onnxruntime", "static"):
        tokens, ours = play(open_graph(spelling, tmp_path, reference), given, table)
        assert tokens == expected, spelling
        np.testing.assert_allclose(ours, logits, atol=1e-4 * np.abs(logits).max(), err_msg=spelling)
    np.testing.assert_allclose(np.load(tmp_path / "fp32" / "embed_tokens.npy"), table, rtol=1e-6)


def without(run: Run, name: str) -> Run:
    return Run(run.embeds, run.positions, {key: value for key, value in run.more.items() if key != name})


def flat(run: Run) -> Run:
    """Each row's time on all axes."""
    return Run(run.embeds, np.tile(run.positions[:1], (3, 1)), run.more)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2_5_vl", flat),
        ("qwen3_vl", flat),
        ("qwen3_vl", lambda run: without(run, "deepstack")),
        ("gemma", lambda run: without(run, "groups")),
        ("gemma2", lambda run: without(run, "groups")),
        ("gemma3", lambda run: without(run, "groups")),
    ],
)
def test_each_input_matters(name: str, change: Any, tmp_path: Path) -> None:
    """The parity above could not fail if a graph and the reference both let an input drop."""
    reference = make_text(name, tmp_path)
    first = runs(reference)[0]
    for spelling in ("onnxruntime", "static"):
        session = open_graph(spelling, tmp_path, reference)
        results = []
        for run in (first, change(first)):
            session.start()
            results.append(session.append(run.embeds, run.positions, **run.more))
        assert np.abs(results[0] - results[1]).max() > 0.02 * np.abs(results[0]).max(), spelling
