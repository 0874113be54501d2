"""What `--target auto` makes of a machine: a Jetson, a GPU, neither, and drivers that misbehave."""

from __future__ import annotations

import subprocess

import pytest

from svdprune.runtime import machine
from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.machine import detect_target, resolve_target


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
