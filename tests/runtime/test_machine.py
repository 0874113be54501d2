"""What `--target auto` makes of a machine: a Jetson, a GPU, neither, and drivers that misbehave."""

from __future__ import annotations

import subprocess

import pytest

from svdprune.runtime import machine
from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.machine import (
    Gpu,
    HostMemory,
    detect_target,
    host_memory,
    local_gpu,
    power_mode,
    resolve_target,
)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without a device tree whose nvidia-smi is the callable put in the returned dict."""
    monkeypatch.setattr(machine, "DEVICE_TREE", tmp_path / "model")
    state = {"smi": lambda: _raise(FileNotFoundError("nvidia-smi"))}

    def run(command, **_):
        assert command[0] == "nvidia-smi"
        return state["smi"]()

    monkeypatch.setattr(machine.subprocess, "run", run)
    state["tree"] = tmp_path / "model"
    return state


def _raise(error):
    raise error


def _answers(text):
    return lambda: subprocess.CompletedProcess((), 0, stdout=text, stderr="")


def test_no_driver_is_cpu(bare):
    found = resolve_target("auto")
    assert found.target.name == "cpu" and "no NVIDIA GPU" in found.found


@pytest.mark.parametrize("words", ["No devices were found", "couldn't communicate with the NVIDIA driver"])
def test_tools_without_a_gpu_are_cpu(bare, words):
    bare["smi"] = lambda: _raise(subprocess.CalledProcessError(9, "nvidia-smi", output=words, stderr=""))
    assert detect_target().target.name == "cpu"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("NVIDIA GeForce RTX 3080, 8.6", "rtx-30"),
        ("NVIDIA GeForce RTX 4090, 8.9", "rtx-40"),
        ("NVIDIA GeForce RTX 5070, 12.0", "rtx-50"),
        ("NVIDIA A100-SXM4-80GB, 8.0", "a100"),
        ("NVIDIA H200, 9.0", "h100"),
    ],
)
def test_a_gpu_is_known_by_its_compute_capability(bare, line, name):
    bare["smi"] = _answers(line + "\nTesla T4, 7.5\n")  # the first GPU counts
    found = detect_target()
    assert found.target.name == name and line.split(",")[0] in found.found


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0", "jetson-orin-nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "jetson-orin"),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", "jetson-thor"),
    ],
)
def test_a_jetson_is_known_by_its_device_tree(bare, model, name):
    bare["tree"].write_text(model)
    found = detect_target()
    assert found.target.name == name and "\0" not in found.found


def test_an_unlisted_gpu_or_jetson_is_named(bare):
    bare["smi"] = _answers("Tesla T4, 7.5\n")
    with pytest.raises(UserError, match=r"Tesla T4 \(sm 75\), for which there is no target"):
        detect_target()
    bare["tree"].write_text("NVIDIA Jetson Xavier NX Developer Kit")
    with pytest.raises(UserError, match="Xavier NX"):
        detect_target()


def test_another_single_board_computer_is_cpu(bare):
    bare["tree"].write_text("Raspberry Pi 5 Model B")
    assert detect_target().target.name == "cpu"


def test_a_driver_that_fails_is_an_error_not_a_cpu(bare):
    bare["smi"] = lambda: _raise(subprocess.CalledProcessError(1, "nvidia-smi", output="", stderr="library mismatch"))
    with pytest.raises(SvdpruneError, match="library mismatch"):
        detect_target()
    bare["smi"] = lambda: _raise(subprocess.TimeoutExpired("nvidia-smi", 20))
    with pytest.raises(SvdpruneError, match="no answer"):
        detect_target()
    bare["smi"] = _answers("gibberish\n")
    with pytest.raises(SvdpruneError, match="gibberish"):
        detect_target()


def test_a_named_target_asks_no_driver(bare):
    bare["smi"] = lambda: pytest.fail("nvidia-smi was called")
    assert resolve_target("jetson-orin").target.name == "jetson-orin"


def test_the_gpu_here(bare, tmp_path, monkeypatch):
    assert local_gpu() is None
    answers = {"name,compute_cap": "NVIDIA GeForce RTX 4090, 8.9\n", "memory.total,memory.free": "24564, 20000\n"}

    def smi(command, **_):
        return subprocess.CompletedProcess((), 0, stdout=answers[command[1].partition("=")[2]], stderr="")

    monkeypatch.setattr(machine.subprocess, "run", smi)
    assert local_gpu() == Gpu("NVIDIA GeForce RTX 4090", 89, False, 24564 << 20, 20000 << 20)
    answers["memory.total,memory.free"] = "[N/A], [N/A]\n"
    assert local_gpu().total is None
    bare["tree"].write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable: 32 kB\nSwapFree: 8 kB\nHuge: 0\n")
    assert local_gpu() == Gpu("NVIDIA Jetson AGX Orin Developer Kit", 87, True, 64 << 10, 32 << 10)
    assert host_memory() == HostMemory(64 << 10, 32 << 10, 8 << 10)
    (tmp_path / "meminfo").unlink()
    assert host_memory() is None and local_gpu().free is None


def test_the_power_mode(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "POWER_STATUS", tmp_path / "status")

    def run(command, **_):
        assert command == ("nvpmodel", "-q")
        return subprocess.CompletedProcess((), 0, stdout="NVPM WARN: fan\nNV Power Mode: MAXN_SUPER\n2\n", stderr="")

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert power_mode() == "MAXN_SUPER"
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: _raise(FileNotFoundError("nvpmodel")))
    assert power_mode() is None
    (tmp_path / "status").write_text("nothing")
    assert power_mode() is None
    (tmp_path / "status").write_text("pmode:0002 fmode:quiet\n")
    assert power_mode() == "number 2"
