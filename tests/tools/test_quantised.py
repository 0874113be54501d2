"""The tool that measures 8-bit vision graphs: what it counts, and its tables."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools import quantised
from tools.quantised import CASES, Seen, ask, block_table, cpu, main_table

PIXELS = np.zeros((4, 4, 3), np.uint8)
QUESTION = SimpleNamespace(text="What?", answer="red")


class FakeSession:
    def __init__(self, features: list[list[float]], kept: list[int]) -> None:
        self.out = [np.array([features], np.float32), np.array([kept]), np.zeros((1, 4), np.float32)]

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert feeds["pixels"].shape == (1, 4, 4, 3)
        return self.out


class FakeVlm:
    """Answers with the indices that were kept."""

    def ask(self, sight: object, question: str, **options: object) -> SimpleNamespace:
        kept = sight.kept_indices.tolist()  # type: ignore[attr-defined]
        return SimpleNamespace(token_ids=kept, text="red" if kept == [0, 1] else "blue")


def asked(*sessions: FakeSession) -> list[Seen]:
    tallies = [Seen() for _ in sessions]
    for session, tally in zip(sessions, tallies, strict=True):
        ask(FakeVlm(), session, PIXELS, QUESTION, tally, tallies[0], 4)  # type: ignore[arg-type]
    return tallies


def test_what_is_counted() -> None:
    plain, same, other = asked(
        FakeSession([[1, 0], [0, 1]], [0, 1]),
        FakeSession([[2, 0], [0, 3]], [0, 1]),
        FakeSession([[1, 1], [5, 5]], [0, 2]),
    )
    assert plain.right == same.right == [True] and other.right == [False]
    assert (same.same, same.first, same.overlap, same.cosine) == ([True], [True], [1.0], [pytest.approx(1.0)])
    assert (other.same, other.first, other.overlap) == ([False], [True], [0.5])
    assert other.cosine == [pytest.approx(2**-0.5)]


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Seen([1.0], [1.0], [True], [True], [True], [2.0])
    info = SimpleNamespace(
        float_blocks=["b"], blocks=2, sensitivity=[SimpleNamespace(block=n, cosine=0.999, overlap=0.9) for n in "ab"]
    )
    bundles = {}
    for case in CASES:
        place = tmp_path / f"{case.precision}-{case.target}"
        place.mkdir(exist_ok=True)
        (place / "vision.onnx").write_bytes(b"x" * (100 if case.precision == "fp32" else 50))
        bundles[case.precision, case.target] = place

    def load(bundle: Path, verify: bool) -> SimpleNamespace:
        given = None if bundle.name.startswith("fp32") else info
        return SimpleNamespace(manifest=SimpleNamespace(vision=SimpleNamespace(quantisation=given)))

    monkeypatch.setattr(quantised, "load", load)
    rows = main_table({case.name: tally for case in CASES}, bundles).splitlines()[2:]
    assert rows[0].startswith("| fp32 | all | 1.00000 / 1.0000 | 1.000 / 1.000 | 1.000 | 1.000 | 1.000 | 1.00 | 1.00 |")
    assert rows[1].endswith("| 0.50 | 1.00 |") and rows[2].endswith("| 0.50 | - |") and "| 1 of 2 |" in rows[1]
    blocks = block_table(bundles).splitlines()
    assert blocks[3].startswith("| `b` | 1.0e-03 (float) | 0.900 |") and blocks[2].startswith(
        "| `a` | 1.0e-03 | 0.900 |"
    )


def test_the_cpu_is_named() -> None:
    assert cpu().endswith(")") and "(" in cpu()
