"""The roofline itself: what bounds a piece of work, and what a target's peaks are."""

from __future__ import annotations

import pytest

from svdprune.runtime.errors import UserError
from svdprune.runtime.roofline import Efficiency, Machine, Work, machine, stage_time, time_of
from svdprune.runtime.targets import TARGETS

ROUND = Machine("round", (("fp16", 1e12), ("fp32", 1e11)), 1e9, 10**9, False)
IDEAL = Efficiency(1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work("products", flops=2e12, moved=1e9), 2.0, "compute"),
        (Work("products", flops=2e12, precision="fp32"), 20.0, "compute"),
        (Work("weights", flops=1e12, weights=1e9, cache=2e9), 3.0, "memory"),
        (Work("nothing"), 0.0, "compute"),
    ],
)
def test_work_takes_as_long_as_its_slowest_limit(work: Work, seconds: float, bound: str) -> None:
    time = time_of(work, ROUND, IDEAL)
    assert time.seconds == pytest.approx(seconds)
    assert time.bound == bound


def test_efficiencies_slow_each_limit_alone() -> None:
    work = Work("both", flops=1e12, moved=1e9, kernels=3)
    time = time_of(work, ROUND, Efficiency(0.5, 0.25, 2.0))
    assert (time.compute, time.memory, time.kernels) == (2.0, 4.0, 6.0)
    assert time.bound == "kernels"


def test_a_stage_is_the_sum_of_its_groups_and_says_what_governs_it() -> None:
    works = [Work("a", flops=3e12), Work("b", weights=1e9), Work("c", moved=0.5e9)]
    stage = stage_time(works, ROUND, IDEAL)
    assert stage.seconds == pytest.approx(4.5)
    assert (stage.compute_bound, stage.memory_bound, stage.bound) == (pytest.approx(3.0), pytest.approx(1.5), "compute")
    assert (stage.flops, stage.bytes, stage.kernels) == (3e12, 1.5e9, 3)


def test_a_stage_without_work_takes_no_time() -> None:
    assert (stage_time([], ROUND).seconds, stage_time([], ROUND).bound) == (0.0, "none")


def test_so_many_times_a_group_is_that_much_of_everything() -> None:
    work = Work("layer", 1.0, 2.0, 3.0, 4.0, kernels=5).times(7)
    assert (work.flops, work.weights, work.moved, work.cache, work.kernels) == (7, 14, 21, 28, 35)


def test_every_target_with_a_gpu_has_a_machine() -> None:
    for target in TARGETS.values():
        if target.sm is not None:
            on = machine(target)
            assert on.peak("fp32") < on.peak("fp16")
            assert on.peak("int4") <= on.peak("fp16")  # unpacked in registers, computed in FP16
            assert on.bandwidth == target.bandwidth_gbs * 1e9


def test_fp32_peaks_are_those_of_the_data_sheets() -> None:
    """Derived from the FP16 peak and the rates of a multiprocessor; TFLOPS of the CUDA cores as the vendor has them."""
    for name, tflops in (("a100", 19.5), ("h100", 67), ("rtx-30", 35.6), ("rtx-40", 82.6), ("jetson-orin", 5.3)):
        assert machine(TARGETS[name]).peak("fp32") / 1e12 == pytest.approx(tflops, rel=0.09)


def test_another_power_mode_scales_every_peak() -> None:
    full, slow = machine(TARGETS["jetson-orin-nano"]), machine(TARGETS["jetson-orin-nano"], tflops=8.5, bandwidth=68)
    assert slow.bandwidth == 68e9
    for (name, peak), (_, slower) in zip(full.peaks, slow.peaks, strict=True):
        assert slower == pytest.approx(peak / 2), name


def test_a_target_without_peaks_asks_for_them() -> None:
    with pytest.raises(UserError, match=r"no peaks for cpu.*give --tflops and --bandwidth"):
        machine(TARGETS["cpu"])
    with pytest.raises(UserError, match=r"give --bandwidth$"):
        machine(TARGETS["cpu"], tflops=1.0)
    on = machine(TARGETS["cpu"], tflops=1.0, bandwidth=50)
    assert {peak for _, peak in on.peaks} == {1e12}
    assert on.memory is None


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_peak_is_above_nothing(value: float) -> None:
    with pytest.raises(UserError, match="--tflops must be above 0"):
        machine(TARGETS["h100"], tflops=value)
    with pytest.raises(UserError, match="--bandwidth must be above 0"):
        machine(TARGETS["h100"], bandwidth=value)


def test_a_peak_that_is_not_known_is_not_guessed() -> None:
    with pytest.raises(UserError, match="peak of round in fp8 is not known: choose fp16, fp32"):
        ROUND.peak("fp8")
    with pytest.raises(UserError, match="unknown precision 'fp7'"):
        ROUND.peak("fp7")


@pytest.mark.parametrize("shares", [(0.0, 0.5, 0.0), (0.5, 1.1, 0.0), (0.5, 0.5, -1.0)])
def test_an_efficiency_is_a_share(shares: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="an efficiency is a share"):
        Efficiency(*shares)
