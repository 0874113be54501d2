"""Which targets get a decoder graph for engines, and which lengths of its KV cache are refused."""

from __future__ import annotations

from typing import Any

import pytest

from svdprune.exporter.decoder.engine_choice import check_cache, default_cache, plan_engine
from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import TARGETS
from tests.exporter.decoder_models import TEXT

CONTEXT = 160


@pytest.fixture
def text() -> dict[str, Any]:
    config: dict[str, Any] = TEXT["llama"].to_dict()
    return config


@pytest.mark.parametrize("target", [target for target in TARGETS.values() if not target.releases])
def test_without_tensorrt_there_is_nothing_to_write_or_to_say(target: Any, text: dict[str, Any]) -> None:
    plan = plan_engine(target, "auto", None, text, keep=4)
    assert (plan.cache, plan.note) == (None, None)


@pytest.mark.parametrize("name", ["rtx-30", "rtx-40", "rtx-50", "a100", "h100"])
def test_where_every_release_has_the_operators_nothing_is_refused(name: str, text: dict[str, Any]) -> None:
    plan = plan_engine(TARGETS[name], "auto", None, text, keep=4)
    assert (plan.cache, plan.note, plan.releases) == (CONTEXT, None, TARGETS[name].releases)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("jetson-orin-nano", "TensorRT 10.3 (JetPack 6.2) cannot build"),
        ("jetson-orin", "TensorRT 10.3 (JetPack 6.2) cannot build"),
        ("jetson-thor", "TensorRT 10.13 (JetPack 7.1) cannot build"),
    ],
)
def test_old_releases_of_a_target_are_named_and_the_new_ones_served(
    name: str, lacking: str, text: dict[str, Any]
) -> None:
    plan = plan_engine(TARGETS[name], "auto", None, text, keep=4)
    assert plan.cache == CONTEXT
    assert plan.note is not None
    assert plan.note.startswith(lacking)
    assert plan.note.endswith("there the vision engine is chained to ONNX Runtime's decoder")
    assert "7.2" not in plan.note
    assert all(release.name.startswith("JetPack 7.2") for release in plan.releases)


def test_a_target_with_old_releases_only_gets_none(text: dict[str, Any]) -> None:
    import dataclasses

    orin = TARGETS["jetson-orin"]
    old = dataclasses.replace(orin, releases=orin.releases[:1])
    plan = plan_engine(old, "auto", None, text, keep=4)
    assert plan.cache is None
    assert plan.note is not None
    assert "TensorRT 10.3 (JetPack 6.2)" in plan.note


def test_none_is_none_and_the_manifest_will_say_so(text: dict[str, Any]) -> None:
    plan = plan_engine(TARGETS["rtx-40"], "none", None, text, keep=4)
    assert plan.cache is None
    assert plan.note is not None
    assert "--decoder-engine none" in plan.note
    assert plan_engine(TARGETS["cpu"], "none", None, text, keep=4).note is None


@pytest.mark.parametrize(("target", "wanted"), [("cpu", "auto"), ("rtx-40", "none")])
def test_a_cache_without_an_engine_is_refused(target: str, wanted: str, text: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"--cache 100 is for the decoder engine, and there is none \(.+\): leave it out"
    ):
        plan_engine(TARGETS[target], wanted, 100, text, keep=4)


def test_a_choice_that_is_neither_is_refused(text: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="auto or none"):
        plan_engine(TARGETS["rtx-40"], "yes", None, text, keep=4)


def test_the_length_asked_for_is_taken(text: dict[str, Any]) -> None:
    assert plan_engine(TARGETS["rtx-40"], "auto", 100, text, keep=4).cache == 100


@pytest.mark.parametrize(
    ("context", "keep", "rows"),
    [(4096, 32, 2048), (1024, 32, 1024), (32768, 576, 2048), (32768, 2880, 3904), (4096, 3500, 4096)],
)
def test_the_length_by_itself(context: int, keep: int, rows: int) -> None:
    assert default_cache(context, keep) == rows


@pytest.mark.parametrize(
    ("rows", "context", "keep", "said"),
    [
        (4097, 4096, 32, r"longer than the model's context: give --cache 4096 or less"),
        (95, 4096, 32, r"cannot hold 32 vision tokens .* give --cache 2048, or keep fewer tokens"),
        (100, 120, 80, r"cannot hold 80 vision tokens .* \(at least 64 rows\): keep fewer tokens"),
    ],
)
def test_lengths_that_cannot_be(rows: int, context: int, keep: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_cache(rows, context, keep)
    check_cache(min(context, 96), context, min(keep, 32))
