"""Two pictures and chats on bundles whose decoders place, stack or mask pictures' rows, by both decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdprune.exporter.export import ExportRequest, export_model
from svdprune.runtime import load
from svdprune.runtime.verify import verify
from svdprune.runtime.verify_against import verify_against
from tests.exporter import gemma_models, qwen_models

SAVES: dict[str, Callable[[Path], Path]] = {
    "gemma3": gemma_models.save_gemma3,
    "qwen3_vl": qwen_models.save_qwen3,
}


@pytest.fixture(scope="module", params=list(SAVES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVES[name](tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    export_model(ExportRequest(str(folder), "5", rank=4, out=out, report=False))
    return out


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(5)
    sizes = [(120, 90), (80, 110), (100, 100)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).resize(size) for size in sizes]


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_both_decoders_answer_alike(folder: Path, bundle: Path, positions: str) -> None:
    """Two pictures at once, a question more, then a third picture."""
    first, second, third = pictures()
    told: list[list[list[int]]] = []
    for decoder, checkpoint in (("onnxruntime", None), ("transformers", str(folder))):
        with load(bundle, decoder=decoder, positions=positions, checkpoint=checkpoint) as vlm:
            chat = vlm.chat([first, second])
            answers = [chat.ask("What is it?", max_new_tokens=6).token_ids]
            assert answers[0] == vlm.ask([first, second], "What is it?", max_new_tokens=6).token_ids
            answers.append(chat.ask("And now?", max_new_tokens=6).token_ids)
            answers.append(chat.ask("And this?", max_new_tokens=6, images=third).token_ids)
            told.append(answers)
    assert told[0] == told[1]


def test_the_golden_case_and_the_comparison_of_backends(bundle: Path) -> None:
    report = verify(bundle)
    assert report.passed, report
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    against = verify_against(bundle, "onnxruntime")
    assert against.passed, against
