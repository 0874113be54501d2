"""Hugging Face data sets on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svdprune.calib.sources import open_source
from svdprune.runtime.errors import UserError

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield


def table(count: int = 4, **columns: list[Any]) -> Any:
    images = [Image.new("RGB", (20 + number, 10), (number * 30, 0, 0)) for number in range(count)]
    held = datasets.Dataset.from_dict({"picture": images, **columns})
    return held.cast_column("picture", datasets.Image())


def asked() -> Any:
    return table(
        question=["a?", "b?", "c?", "d?"],
        answers=[["x", "y"], ["z"], ["x"], ["y"]],
        kind=["k", "k", "l", "l"],
    )


def test_a_saved_data_set(tmp_path: Path) -> None:
    asked().save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hf:{tmp_path / 'saved'}", limit=3, seed=1)
    samples = list(source.samples())
    assert len(samples) == 3 and source.skipped == 1
    by_name = {s.name: s for s in open_source(f"hf:{tmp_path / 'saved'}", limit=9, seed=0).samples()}
    assert by_name["row 0"].image.size == (20, 10)
    question = by_name["row 0"].questions[0]
    assert (question.text, question.answers, question.kind) == ("a?", ["x", "y"], "k")
    with pytest.raises(UserError, match="has one split only"):
        open_source(f"hf:{tmp_path / 'saved'}:test", limit=1, seed=0)


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    held = datasets.DatasetDict({"train": table(3), "validation": table(2)})
    held.save_to_disk(str(tmp_path / "saved"))
    assert open_source(f"hf:{tmp_path / 'saved'}", limit=9, seed=0).count == 2
    assert open_source(f"hf:{tmp_path / 'saved'}:train", limit=9, seed=0).count == 3
    with pytest.raises(UserError, match="no split 'test': choose one of train, validation"):
        open_source(f"hf:{tmp_path / 'saved'}:test", limit=1, seed=0)


def test_parquet_files_and_a_broken_picture(tmp_path: Path) -> None:
    good = asked().cast_column("picture", datasets.Image(decode=False)).to_dict()
    good["picture"][2]["bytes"] = b"not a picture"
    held = datasets.Dataset.from_dict(good).cast_column("picture", datasets.Image(decode=False))
    (tmp_path / "data").mkdir()
    held.cast_column("picture", datasets.Image()).to_parquet(str(tmp_path / "data" / "test-00000-of-00001.parquet"))
    source = open_source(f"hf:{tmp_path / 'data'}", limit=9, seed=0)
    assert "split test" in source.listing.description
    assert sorted(s.name for s in source.samples()) == ["row 0", "row 1", "row 3"]
    assert [name for name, _ in source.broken] == ["row 2"]


def test_several_questions_in_a_row_and_annotators_as_records(tmp_path: Path) -> None:
    held = table(1, question=[["a?", "b?"]], answers=[["x", "y"]])
    held.save_to_disk(str(tmp_path / "lists"))
    (sample,) = open_source(f"hf:{tmp_path / 'lists'}", limit=1, seed=0).samples()
    assert [(q.text, q.answers) for q in sample.questions] == [("a?", ["x"]), ("b?", ["y"])]
    held = table(1, question=["a?"], answers=[[{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]])
    held.save_to_disk(str(tmp_path / "records"))
    (sample,) = open_source(f"hf:{tmp_path / 'records'}", limit=1, seed=0).samples()
    assert sample.questions[0].answers == ["x", "y"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data set"):
        open_source(f"hf:{tmp_path / 'empty'}", limit=1, seed=0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(f"hf:{tmp_path / 'broken'}", limit=1, seed=0)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="no column of pictures: its columns are text"):
        open_source(f"hf:{tmp_path / 'text'}", limit=1, seed=0)
    with pytest.raises(UserError, match=r"cannot be loaded .* give its folder"):
        open_source("hf:nobody/nothing", limit=1, seed=0)
