"""The printed lines: what Polygraphy's own parser takes, and what differs between TensorRT's releases."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_engines
from click.testing import CliRunner
from golden import golden_bundle

pytest.importorskip("polygraphy", reason="the lines are checked by Polygraphy's parser")

from svdprune.runtime.errors import SvdpruneError
from tools import trt_commands


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a golden case and a decoder graph for engines."""
    folder = tmp_path_factory.mktemp("golden")
    return golden_bundle(tiny_engines.engine_bundle(folder / "engines"), folder / "right")


_RTX = tuple(trt_commands.RTX.split("="))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(trt_commands.main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def lines(text: str, start: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.startswith(start)]


def test_every_release_and_part_has_its_lines(right: Path, tmp_path: Path) -> None:
    code, text, _ = run(right, "--dir", tmp_path)
    assert code == 0
    titles = [line for line in text.splitlines() if re.match(r"# .*; TensorRT", line)]
    assert len(titles) == 9  # vision, prefill and decode, each for 10, 11 and RTX
    assert len(lines(text, "polygraphy run")) == len(lines(text, "trtexec")) == 6
    assert len(lines(text, f"{trt_commands.RTX} polygraphy")) == 9
    assert "present.* wants the memory of its past.*" in text


def test_what_differs_between_the_releases(right: Path, tmp_path: Path) -> None:
    _, ten, _ = run(right, "--dir", tmp_path, "--tensorrt", "10", "--part", "vision")
    _, eleven, _ = run(right, "--dir", tmp_path, "--tensorrt", "11", "--part", "vision")
    (trtexec10,), (trtexec11,) = lines(ten, "trtexec"), lines(eleven, "trtexec")
    assert set(trtexec10) - set(trtexec11) == {"--stronglyTyped"}
    for line in (trtexec10, trtexec11):
        assert {"--noTF32", "--separateProfileRun", "--profilingVerbosity=detailed", "--percentile=50,90,99"} <= set(
            line
        )
        assert not {"--fp16", "--int8", "--best"} & set(line)
    side = tiny.SIDE
    assert f"--maxShapes=pixels:1x{side}x{side}x3" in trtexec10
    (first,) = lines(ten, "polygraphy run")
    assert "--strongly-typed" in first and "--tf32" not in first and "--onnxrt" in first


def test_shapes_are_those_of_the_build(right: Path, tmp_path: Path) -> None:
    _, text, _ = run(right, "--dir", tmp_path, "--tensorrt", "11", "--batch", "4")
    vision, prefill, decode = lines(text, "polygraphy run")
    assert f"pixels:[4,{tiny.SIDE},{tiny.SIDE},3]" in vision
    for line, profile in ((prefill, "0"), (decode, "1")):
        assert line[line.index("--optimization-profile") + 1] == profile and line.count("--trt-max-shapes") == 2
        assert f"inputs_embeds:[1,{tiny_engines.CACHE},{tiny.HIDDEN}]" in line
        assert "--onnxrt" not in line
    trtexec = lines(text, "trtexec")[2]
    assert f"--optShapes=inputs_embeds:1x1x{tiny.HIDDEN},position_ids:1x1" in trtexec


def test_the_inputs_are_the_golden_case_s(right: Path, tmp_path: Path) -> None:
    """Polygraphy runs ONNX Runtime on what was written."""
    code, _, _ = run(right, "--dir", tmp_path / "a folder", "--tensorrt", "11", "--runs", "2")
    assert code == 0
    place = tmp_path / "a folder"
    assert (place / "vision/pixels.bin").stat().st_size == tiny.SIDE**2 * 3
    for name, graph in (("vision", "vision.onnx"), ("decoder-prefill", "decoder/engine.onnx")):
        arguments = _arguments(right / graph, place / name)
        command = [sys.executable, "-c", f"from polygraphy.tools import main; raise SystemExit(main({arguments!r}))"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Completed 2 iteration(s)" in done.stdout


def _arguments(graph: Path, place: Path) -> list[str]:
    script = ["--data-loader-script", str(place / "load.py"), "--sequential-runners", "--warm-up", "1"]
    return ["run", str(graph), "--onnxrt", *script]


def test_tensorrt_rtx_s_line_builds_here(right: Path, tmp_path: Path) -> None:
    """The one line that needs no GPU is run as it is printed: strongly typed, TF32 off."""
    pytest.importorskip("tensorrt_rtx", reason="the line is of TensorRT-RTX")
    _, text, _ = run(right, "--dir", tmp_path, "--tensorrt", "rtx", "--part", "vision")
    line = next(line for line in lines(text, trt_commands.RTX) if "convert" in line)
    arguments = line[line.index("convert") : line.index("#")]
    command = [sys.executable, "-c", f"from polygraphy.tools import main; raise SystemExit(main({arguments!r}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **dict([_RTX])})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Flags +\| \[STRONGLY_TYPED\]", done.stdout)
    assert (tmp_path / "vision.rtx.engine").stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("polygraphy run x.onnx --trt --nonsense 3", "does not know --nonsense 3"),
        ("polygraphy run x.onnx --trt --warm-up many", "does not take this line .*invalid"),
        ("polygraphy bake x.onnx", "does not take this line .*invalid choice"),
    ],
)
def test_a_line_that_polygraphy_does_not_take_is_an_error(line: str, words: str) -> None:
    with pytest.raises(SvdpruneError, match=words):
        trt_commands.check(shlex.split(line))


def test_a_bundle_without_a_decoder_graph(tmp_path: Path) -> None:
    plain = golden_bundle(tiny.make_bundle(tmp_path / "source"), tmp_path / "plain")
    code, text, _ = run(plain, "--dir", tmp_path / "trt", "--tensorrt", "10")
    assert code == 0 and "decoder" not in text
    code, _, error = run(plain, "--dir", tmp_path / "trt", "--part", "decoder")
    assert code == 1 and "has no decoder graph for engines" in error
    code, _, error = run(tmp_path / "absent")
    assert code == 1 and "no bundle at" in error
