"""The rows of the target table, and what may be asked of them."""

from __future__ import annotations

import json

import pytest

from svdprune.runtime.errors import UserError
from svdprune.runtime.targets import (
    PRECISIONS,
    RELEASES,
    TARGETS,
    check_precision,
    find_target,
    opset_limit,
    target_names,
)
from svdprune.runtime.traps import OLDEST, TENSORRT_RTX, TRAPS, parse_version, traps_of

JETSONS = ("jetson-orin-nano", "jetson-orin-nx", "jetson-orin", "jetson-thor")
GPUS = tuple(name for name in TARGETS if name != "cpu")


def test_every_promised_target_is_there():
    promised = {"cpu", *JETSONS, "rtx-30", "rtx-40", "rtx-50", "a100", "h100"}
    assert set(TARGETS) == promised
    assert set(target_names()) == promised | {"auto"}


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_row_is_complete(name):
    row = TARGETS[name]
    assert row.name == name
    assert None not in (row.sm, row.memory_gb, row.bandwidth_gbs, row.fp16_tflops, row.int8_tops)
    assert row.memory_shared is (name in JETSONS)
    assert row.releases and row.traps and set(row.precisions) <= set(PRECISIONS)
    assert row.opset_ceiling is not None and row.opset_ceiling >= 18  # the vision graphs are opset 17 or 18
    assert row.int8_tops > row.fp16_tflops
    assert (row.fp8_tflops is not None) == ("fp8" in row.precisions) == (row.sm >= 89)
    assert (row.fp4_tflops is not None) == ("fp4" in row.precisions) == (row.sm >= 100)
    assert row.source  # no figure without the document it is from
    assert [parse_version(release.tensorrt) for release in row.releases] == sorted(
        parse_version(release.tensorrt) for release in row.releases
    )


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_release_is_complete(release):
    version = parse_version(release.tensorrt)
    assert version >= OLDEST and 18 <= release.opset == opset_limit(version)
    assert release.traps and all(trap.endswith(".") for trap in release.traps)
    if release.name.startswith("JetPack"):
        assert release.python in ("3.10", "3.12") and release.title == f"TensorRT {release.tensorrt} ({release.name})"
    else:
        assert release.title == release.name


def test_orin_runs_two_jetpacks_and_its_ceiling_is_the_older_ones():
    row = find_target("jetson-orin")
    releases = {release.name: release for release in row.releases}
    assert releases["JetPack 6.2"].tensorrt == "10.3" and releases["JetPack 6.2"].python == "3.10"
    assert releases["JetPack 7.2"].tensorrt == "10.16"
    assert row.opset_ceiling == releases["JetPack 6.2"].opset == 20
    assert any("ScatterND" in trap for trap in row.traps)
    assert len(set(row.traps)) == len(row.traps)


def test_the_opset_between_two_releases_is_the_older_ones():
    versions = ((10, 3), (10, 14), (10, 16), (12, 0))
    assert [opset_limit(version) for version in versions] == [20, 20, 24, 25]


def test_rules_come_and_go_by_release():
    names = {version: {trap.name for trap in traps_of(version)} for version in ("10.3", "10.13", "10.16", "11.4")}
    assert names["10.3"] - names["10.13"] == {
        *("windows", "stft", "scatternd-opset", "einsum", "pow-base", "pow-exponent"),
        *("squeeze-initialiser", "pad-axes", "qdq-uint8"),
    }
    assert {"attention", "decoder-operators"} <= names["10.13"] - names["10.16"]
    assert names["10.16"] - names["11.4"] == {"newer-operators"}
    rtx = {trap.name for trap in traps_of("11.4", TENSORRT_RTX)}
    assert rtx - names["11.4"] == {"data-dependent-rtx", "dft-rtx"}
    assert {trap.name for trap in TRAPS} == names["10.3"] | names["11.4"] | rtx


def test_tensorrt_rtx_builds_for_desktops_and_not_for_jetsons():
    assert [name for name, row in TARGETS.items() if row.tensorrt_rtx] == ["rtx-30", "rtx-40", "rtx-50", "a100"]


def test_cpu_has_no_tensorrt():
    row = find_target("cpu")
    assert row.releases == () and row.traps == () and row.opset_ceiling is None


@pytest.mark.parametrize(("wrong", "meant"), [("jetson-orinn", "jetson-orin"), ("RTX-40", "rtx-40"), ("h-100", "h100")])
def test_an_unknown_target_names_near_misses_and_all(wrong, meant):
    with pytest.raises(UserError) as caught:
        find_target(wrong)
    said = str(caught.value)
    assert f"unknown target '{wrong}'" in said and f"did you mean {meant}" in said
    assert all(name in said for name in target_names())


def test_a_target_like_no_other_still_lists_all():
    with pytest.raises(UserError, match="unknown target 'xyzzy': the targets are cpu, "):
        find_target("xyzzy")


@pytest.mark.parametrize("name", ["jetson-orin-nano", "jetson-orin-nx", "jetson-orin"])
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_orin_refuses_fp8_and_fp4_with_the_reason(name, precision):
    with pytest.raises(UserError) as caught:
        check_precision(find_target(name), precision)
    said = str(caught.value)
    assert f"cannot run {precision}" in said and "tensor cores appear with" in said and "sm 87" in said
    assert "use one of fp32, fp16" in said


@pytest.mark.parametrize(
    ("name", "precision", "runs"),
    [
        ("jetson-thor", "fp4", True),
        ("rtx-40", "fp8", True),
        ("rtx-40", "fp4", False),
        ("rtx-50", "fp4", True),
        ("a100", "fp8", False),
        ("h100", "fp8", True),
        ("h100", "fp4", False),
        ("cpu", "fp16", True),
        ("cpu", "fp8", False),
    ],
)
def test_precisions_by_generation(name, precision, runs):
    if runs:
        check_precision(find_target(name), precision)
    else:
        with pytest.raises(UserError, match=f"{name} cannot run {precision}"):
            check_precision(find_target(name), precision)


def test_a_precision_that_does_not_exist_is_another_mistake():
    with pytest.raises(UserError, match="unknown precision 'fp12': it must be one of fp32"):
        check_precision(find_target("cpu"), "fp12")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_rows_go_through_json(name):
    row = json.loads(json.dumps(find_target(name).to_dict()))
    assert row["name"] == name and row["opset_ceiling"] == find_target(name).opset_ceiling
    assert row["tensorrt_rtx"] is find_target(name).tensorrt_rtx
    assert all(release["traps"] for release in row["releases"])
    assert [release["name"] for release in row["releases"]] == [release.name for release in find_target(name).releases]
