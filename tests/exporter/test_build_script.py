"""`build.sh`: a POSIX script that checks what the device has, says what is missing, and builds."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from svdprune.exporter.build_script import build_script, decoder_command, write_build_script
from svdprune.runtime.manifest import DecoderEngineInfo, Manifest
from svdprune.runtime.targets import TARGETS, find_target

BUILDABLE = [name for name, row in TARGETS.items() if row.releases]
SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]


def manifest(engine: bool = True, **changes: object) -> Manifest:
    made = tiny.manifest(**changes)
    if not engine:
        return made
    info = DecoderEngineInfo(file="decoder/engine.onnx", precision="fp16", opset=24, cache=512)
    return dataclasses.replace(made, decoder=dataclasses.replace(made.decoder, engine=info))


@pytest.fixture
def device(tmp_path: Path):
    """A device: `have` puts stand-ins for Python modules and trtexec there, `run` runs the script on it."""

    class Device:
        bundle = tmp_path / "my bundle's"  # awkward on purpose
        modules = tmp_path / "modules"
        programs = tmp_path / "programs"
        began = tmp_path / "elsewhere"

        def __init__(self) -> None:
            for folder in (self.bundle, self.modules, self.programs, self.began):
                folder.mkdir()

        def have_module(self, name: str, text: str) -> None:
            place = self.modules / name.replace(".", "/") / "__init__.py"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

        def have_svdprune(self) -> None:
            self.have_module("svdprune", "")
            self.have_module("svdprune.runtime", "")
            told = "import json, sys\ndef main():\n    print(json.dumps(sys.argv))\n    sys.exit(7)\n"
            self.have_module("svdprune.runtime.cli", told)

        def have_trtexec(self, version: str, typed: bool = True) -> None:
            place = self.programs / "trtexec"
            place.write_text(
                f"#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] [b1]'\n"
                f"[ \"$1\" != --help ] || {{ echo '{'--stronglyTyped' if typed else '--onnx=<file>'}'; exit 0; }}\n"
                f'printf "%s\\n" "$@" >> {self.began}/calls\n'
            )
            place.chmod(0o755)

        def run(self, *arguments: str, target: str = "jetson-orin", shell: str = "sh", **made: object):
            script = write_build_script(self.bundle, find_target(target), manifest(**made))  # type: ignore[arg-type]
            path = f"{self.programs}:{os.environ['PATH']}"
            environment = {"PATH": path, "PYTHONPATH": str(self.modules), "PYTHONDONTWRITEBYTECODE": "1"}
            command = [shell] if shell != "busybox" else ["busybox", "sh"]
            python = () if "--python" in arguments or "--trtexec" in arguments else ("--python", sys.executable)
            return subprocess.run(
                [*command, str(script), *python, *arguments],
                cwd=self.began,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )

        def calls(self) -> list[str]:
            return (self.began / "calls").read_text().splitlines()

    return Device()


def failed(done, *words: str) -> None:
    """One sentence on stderr and exit code 2."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("build.sh: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("target", BUILDABLE)
@pytest.mark.parametrize("engine", [True, False], ids=["decoder", "vision-only"])
def test_it_is_a_posix_script(tmp_path: Path, target: str, engine: bool) -> None:
    script = write_build_script(tmp_path, find_target(target), manifest(engine))
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/bin/sh\n")
    assert "@" not in text.replace('"$@"', "")  # every blank is filled in
    for shell in SHELLS:
        command = [shell] if shell != "busybox" else ["busybox", "sh"]
        checked = subprocess.run([*command, "-n", str(script)], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_a_target_without_tensorrt_has_none() -> None:
    with pytest.raises(ValueError, match="cpu has no TensorRT"):
        build_script(find_target("cpu"), manifest())


@pytest.mark.parametrize("shell", SHELLS)
def test_it_builds_the_bundle_that_it_lies_in(device, shell: str) -> None:
    device.have_svdprune()
    device.have_module("tensorrt", "__version__ = '10.3.0'\n")
    done = device.run("--level", "5", "--log", "a log", shell=shell)
    assert done.returncode == 7, done.stderr  # svdprune's own exit code
    assert json.loads(done.stdout) == ["svdprune", "build", str(device.bundle), "--level", "5", "--log", "a log"]
    assert done.stderr == ""


def test_no_python(device) -> None:
    failed(device.run("--python", "python-of-no-one"), "there is no python-of-no-one", "--python")
    failed(device.run("--python"), "--python needs the path")


def test_no_svdprune(device) -> None:
    device.have_module("svdprune.runtime", "raise ImportError('no such thing')\n")
    failed(device.run(), "cannot import svdprune", "no such thing", "pip install svdprune")


def test_no_tensorrt_and_a_half_installed_one(device) -> None:
    device.have_svdprune()
    for reason in ("No module named 'tensorrt'", "libnvinfer.so.10: cannot open shared object file"):
        device.have_module("tensorrt", f"raise ImportError({reason!r})\n")
        failed(device.run(), "cannot import TensorRT", reason, "nvidia-jetpack", "--system-site-packages")
    device.have_module("tensorrt_rtx", "")
    failed(device.run(), "nvidia-jetpack")  # TensorRT-RTX does not build for Orin
    failed(device.run(target="h100"), "NVIDIA's package index")


def test_tensorrt_rtx_will_do_where_it_builds(device) -> None:
    device.have_svdprune()
    device.have_module("tensorrt", "raise ImportError('absent')\n")
    device.have_module("tensorrt_rtx", "raise ImportError('absent too')\n")
    failed(device.run(target="rtx-40"), "svdprune[rtx]")
    device.have_module("tensorrt_rtx", "")
    assert device.run(target="rtx-40").returncode == 7


@pytest.mark.parametrize(
    ("version", "target", "words"),
    [
        ("8.6.2", "jetson-orin", ("this is TensorRT 8.6", "TensorRT 10.3 (JetPack 6.2) or newer", "update JetPack")),
        ("10.2.0.19", "jetson-orin", ("this is TensorRT 10.2",)),
        ("10.3.0", "jetson-thor", ("TensorRT 10.13 (JetPack 7.1) or newer",)),
        ("10.9.1", "rtx-40", ("TensorRT 10.16 or newer", "install a newer TensorRT")),
        ("odd", "jetson-orin", ("was not understood",)),
        ("", "jetson-orin", ("was not understood",)),
    ],
)
def test_a_release_that_the_graphs_are_not_for(device, version: str, target: str, words: tuple[str, ...]) -> None:
    device.have_svdprune()
    device.have_module("tensorrt", f"__version__ = {version!r}\n")
    failed(device.run(target=target), *words)


@pytest.mark.parametrize("version", ["10.9.0", "12.1.0"])
def test_a_release_that_was_not_checked_is_told_and_tried(device, version: str) -> None:
    device.have_svdprune()
    device.have_module("tensorrt", f"__version__ = {version!r}\n")
    done = device.run()
    assert done.returncode == 7
    assert "note: this is TensorRT" in done.stderr
    assert "TensorRT 10.3 (JetPack 6.2), TensorRT 10.16 (JetPack 7.2) and TensorRT 11.4" in done.stderr


def test_trtexec_gets_the_same_graphs(device) -> None:
    device.have_trtexec("101601")
    done = device.run("--trtexec", "--skipInference")
    assert done.returncode == 0, done.stderr
    shape = f"1x{tiny.SIDE}x{tiny.SIDE}x3"
    width = manifest().decoder.hidden
    likely = 2 * tiny.KEEP + 32
    assert device.calls() == [
        f"--onnx={device.bundle}/vision.onnx",
        "--stronglyTyped",
        "--saveEngine=vision.engine",
        f"--minShapes=pixels:{shape}",
        f"--optShapes=pixels:{shape}",
        f"--maxShapes=pixels:{shape}",
        "--skipInference",
        f"--onnx={device.bundle}/decoder/engine.onnx",
        "--stronglyTyped",
        "--saveEngine=decoder.engine",
        "--profile=0",
        f"--minShapes=inputs_embeds:1x1x{width},position_ids:1x1",
        f"--optShapes=inputs_embeds:1x{likely}x{width},position_ids:1x{likely}",
        f"--maxShapes=inputs_embeds:1x512x{width},position_ids:1x512",
        "--profile=1",
        f"--minShapes=inputs_embeds:1x1x{width},position_ids:1x1",
        f"--optShapes=inputs_embeds:1x1x{width},position_ids:1x1",
        f"--maxShapes=inputs_embeds:1x2x{width},position_ids:1x2",
        "--skipInference",
    ]


def test_trtexec_of_a_release_without_the_decoders_operators(device) -> None:
    device.have_trtexec("100300")
    done = device.run("--trtexec")
    assert done.returncode == 0
    assert "no decoder engine" in done.stderr
    assert not any("decoder" in call for call in device.calls())


def test_trtexec_11_has_no_typed_flag_and_float_pixels_come_by_channel(device) -> None:
    device.have_trtexec("110400", typed=False)
    done = device.run("--trtexec", engine=False, vision={"input": "float32"})
    assert done.returncode == 0, done.stderr
    assert "--stronglyTyped" not in device.calls()
    assert f"--minShapes=pixels:1x3x{tiny.SIDE}x{tiny.SIDE}" in device.calls()


def test_trtexec_missing_too_old_or_silent(device) -> None:
    if shutil.which("trtexec") is None and not Path("/usr/src/tensorrt/bin/trtexec").exists():
        failed(device.run("--trtexec"), "no trtexec on the path", "libnvinfer-bin")
    device.have_trtexec("8602")
    failed(device.run("--trtexec"), "this is TensorRT 8.6", "TensorRT 10.3 (JetPack 6.2) or newer")
    (device.programs / "trtexec").write_text("#!/bin/sh\necho help\n")
    failed(device.run("--trtexec"), "does not say its version")


def test_a_build_by_trtexec_that_fails_is_a_failure(device) -> None:
    device.have_trtexec("100300")
    with (device.programs / "trtexec").open("a") as file:
        file.write("exit 3\n")
    assert device.run("--trtexec").returncode == 3


def test_help_says_what_it_does(device) -> None:
    done = device.run("--help")
    assert done.returncode == 0
    for words in (
        "--trtexec",
        "Target jetson-orin: Jetson AGX Orin 64GB, sm 87",
        "trtexec --stronglyTyped --onnx=vision.onnx",
    ):
        assert words in done.stdout
    assert "set -eu" not in done.stdout


def test_trtexec_gets_a_profile_of_every_input_that_some_decoders_have() -> None:
    made = manifest().decoder
    plain = decoder_command(made, 8)
    wide = decoder_command(dataclasses.replace(made, position_axes=3, deepstack=2, mask="picture"), 8)
    width = made.hidden
    assert f"--maxShapes=inputs_embeds:1x512x{width},position_ids:1x512" in plain
    assert (
        f"--maxShapes=inputs_embeds:1x512x{width},position_ids:3x1x512,deepstack:2x1x512x{width},groups:1x512" in wide
    )
