"""``svdprune build`` as a user meets it, and what ``svdprune inspect`` then lists."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import tiny
import tiny_engines
from click.testing import CliRunner
from fake_trt import uninstall

from svdprune.runtime.cli.app import group
from svdprune.runtime.engines import build as module
from svdprune.runtime.engines.key import RECIPE
from svdprune.runtime.machine import Gpu, HostMemory


@pytest.fixture
def path(tmp_path):
    return golden.golden_bundle(tiny.make_bundle(tmp_path / "plain", target="jetson-orin"), tmp_path / "bundle")


@pytest.fixture
def orin(monkeypatch):
    """A Jetson with TensorRT 10.3."""
    uninstall(monkeypatch, "tensorrt", "tensorrt_rtx")
    _, trt = tiny_engines.machine(monkeypatch, "tensorrt-10.3", 87)
    monkeypatch.setattr(module, "local_gpu", lambda: Gpu("Jetson AGX Orin", 87, True, 10**11, 10**11))
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(10**11, 10**11, 0))
    return trt


def svdprune(*arguments):
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def test_a_build_says_what_it_did(path, orin):
    done = svdprune("build", path)
    assert done.exit_code == 0, done.output
    for words in ("TensorRT 10.3.0, for jetson-orin", "built", "passed", "kept tokens overlap 1"):
        assert words in done.stdout
    assert "memory to build: about" in done.stdout
    assert "building the vision engine" in done.stderr
    again = svdprune("build", path)
    assert "reused, built 20" in again.stdout and "memory to build" not in again.stdout
    orin.fake.version = orin.__version__ = "10.7.0"
    rebuilt = svdprune("build", path)
    assert "rebuilt, the one before was stale: built by version 10.3.0, this is 10.7.0" in rebuilt.stdout


def test_json(path, orin):
    done = svdprune("build", path, "--json", "--level", 2, "--workspace", 0.5, "--batch", "1,2,3")
    (part,) = json.loads(done.stdout)["parts"]
    assert part["state"] == "built" and part["build"]["selftest"] == "passed"
    assert part["build"]["key"]["options"] == {
        "batch": [1, 2, 3], "workspace": 1 << 29, "level": 2, "version_compatible": False, "recipe": RECIPE,
    }  # fmt: skip
    assert {line["name"] for line in part["preflight"]} >= {"memory to build", "memory to run", "TensorRT"}
    listed = json.loads(svdprune("inspect", path, "--json").stdout)["engines"]
    assert [engine["folder"] for engine in listed] == [part["file"].split("/")[-2]]
    assert listed[0]["state"] == "ok" and listed[0]["layers"] > 0 and listed[0]["seconds"] >= 0


def test_inspect_lists_engines_and_their_faults(path, orin):
    assert "self-test" not in svdprune("inspect", path).stdout
    svdprune("build", path)
    shown = svdprune("inspect", path).stdout
    for words in ("TensorRT 10.3.0", "jetson-orin, sm 87", "passed", "ok"):
        assert words in shown
    engine = next((path / "engines").glob("*/vision.engine"))
    engine.write_bytes(b"short")
    listed = json.loads(svdprune("inspect", path, "--json").stdout)["engines"]
    assert "is truncated: it has 5 of" in listed[0]["state"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,2"], "--batch is '1,2', it must be three numbers"),
        (["--batch", "a,b,c"], "it must be three numbers"),
        (["--batch", "2,2,2"], "must start at 1"),
        (["--level", "9"], "--level is 9"),
        (["--workspace", "0.001"], "needs at least 4 MiB"),
        (["--workspace", "-1"], "must be more than 0"),
        (["--target", "cpu"], "has no TensorRT"),
        (["--target", "rtx-40"], "no GPU of sm 89"),
        (["--runtime", "trt"], "choose one of tensorrt, tensorrt_rtx"),
        (["--part", "head"], "choose one of vision, decoder, all"),
    ],
)
def test_what_the_caller_gets_wrong(path, orin, arguments, words):
    done = svdprune("build", path, *arguments)
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("svdprune:") == 1
    assert not (path / "engines").exists() or not list((path / "engines").iterdir())


def test_a_failure_of_tensorrt_is_ours(path, orin):
    orin.fake.build_says = [("ERROR", "Could not find any implementation for node a.")]
    done = svdprune("build", path)
    assert done.exit_code == 1 and "with little memory that is how it reports a lack of it" in done.stderr


# A machine of fakes on which TensorRT is busy for a minute; the tests' process cannot be interrupted itself.
BUSY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {tests!r})
import fake_trt
from svdprune.runtime.cli.app import main
from svdprune.runtime.engines import build
from svdprune.runtime.machine import Gpu
trt = sys.modules["tensorrt"] = fake_trt.make_trt("tensorrt-10.3", 87)
build.local_gpu = lambda: Gpu("Orin", 87, True, 10**11, 10**11)
def busy(phase, step):
    print("busy", file=sys.stderr, flush=True)
    time.sleep({seconds})
trt.fake.on_step = busy
sys.argv = ["svdprune", "build", {path!r}, "--no-preflight"]
main()
"""


@pytest.mark.parametrize(("signals", "seconds"), [(1, 2), (2, 60)])
def test_ctrl_c_ends_the_command_and_leaves_nothing(path, signals, seconds):
    code = BUSY.format(tests=str(Path(__file__).parent), path=str(path), seconds=seconds)
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = ""
    for expected in ("busy", "stopping")[:signals]:
        while expected not in said:
            line = child.stderr.readline()
            assert line, said
            said += line
        child.send_signal(signal.SIGINT)
    _, rest = child.communicate(timeout=120)
    assert child.returncode == 130, said + rest
    assert "svdprune: stopped" in rest and "Traceback" not in rest and "FATAL" not in rest
    assert [place.name for place in (path / "engines").iterdir()] == []
