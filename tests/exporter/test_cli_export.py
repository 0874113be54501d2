"""`svdprune export`: what it refuses at the door, what it hands to the exporter, and what it says at the end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from svdprune.exporter import export as exporter
from svdprune.runtime import machine
from svdprune.runtime.cli.app import group, load_command
from svdprune.runtime.errors import UserError

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from svdprune.runtime.cli import main_export
sys.argv = ["svdprune-export", *{arguments!r}]
main_export()
"""


@pytest.fixture
def export():
    """Call ``svdprune export`` in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(group, ["export", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def requests(monkeypatch):
    """The requests that reach the exporter, which does nothing but report."""
    seen = []

    def export_model(request, progress, say):
        seen.append(request)
        progress("tracing the vision encoder", 0.1)
        progress("tracing the vision encoder", 0.2)
        progress("hashing", None)
        sizes = {"vision": 2_000_000, "decoder": 5_000_000, "bundle": 7_500_000}
        out = request.out or Path("my model-k32-cpu")
        return exporter.ExportSummary(out, 576, 32, sizes, {"vision": 1.5, "decoder": 1})

    monkeypatch.setattr(exporter, "export_model", export_model)
    return seen


def failed(result, code, *words):
    """The result is one sentence on stderr with all of ``words``, and ``code``."""
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("svdprune: "), result.stderr
    for word in words:
        assert word in last, result.stderr


def test_defaults_reach_the_exporter(export, requests):
    result = export("mini-llava", "--keep", 32, "--target", "cpu")
    assert result.exit_code == 0, result.stderr
    assert requests == [exporter.ExportRequest(model="mini-llava", keep="32", target="cpu")]


def test_every_option_reaches_the_exporter(export, requests, tmp_path):
    words = (
        "llava --keep 10% --target jetson-orin --select maxmin --rank 8 --variance 0.9 --block 24 --iterations 5 "
        "--centre --seed 7 --precision fp16 --decoder-precision int4 --positions original --input float32 "
        "--revision main --overwrite --decoder-engine none --cache 512"
    )
    result = export(*words.split(), "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert requests == [
        exporter.ExportRequest(
            model="llava",
            keep="10%",
            target="jetson-orin",
            out=tmp_path / "b",
            select="maxmin",
            rank=8,
            variance=0.9,
            block=24,
            iterations=5,
            centre=True,
            seed=7,
            precision="fp16",
            decoder_precision="int4",
            positions="original",
            input="float32",
            revision="main",
            overwrite=True,
            decoder_engine="none",
            cache=512,
        )
    ]


def test_progress_and_the_closing_summary(export, requests):
    result = export("mini-llava", "--keep", "32", "--target", "cpu")
    assert result.stderr.splitlines() == ["tracing the vision encoder", "hashing"]  # a line a step off a terminal
    for words in ("576 -> 32 (5.6%)", "7.5 MB (vision 2.0 MB, decoder 5.0 MB)", "2.5 s", "my model-k32-cpu"):
        assert words in result.stdout
    assert "svdprune run 'my model-k32-cpu' --image" in result.stdout.splitlines()[-1]


def test_the_summary_tells_of_the_decoder_engine(export, monkeypatch):
    sizes = {"vision": 2_000_000, "decoder": 5_000_000, "decoder for engines": 2_500_000, "bundle": 9_500_000}
    summary = exporter.ExportSummary(Path("b"), 576, 32, sizes, {}, cache=1024, engine_refused="JetPack 6.2 cannot")
    monkeypatch.setattr(exporter, "export_model", lambda request, progress, say: summary)
    shown = " ".join(export("mini-llava", "--keep", "32", "--target", "jetson-orin").stdout.split())
    for words in ("decoder for engines 2.5 MB", "KV cache 1024 rows in a decoder engine", "note JetPack 6.2 cannot"):
        assert words in shown


def test_orin_refuses_fp8_at_the_door(export, requests):
    result = export("mini-llava", "--keep", "32", "--target", "jetson-orin", "--precision", "fp8")
    failed(result, 2, "jetson-orin cannot run fp8", "FP8 tensor cores appear with sm 89", "is sm 87")
    assert requests == []


@pytest.mark.parametrize(("name", "device"), [("jetson-orin", "Jetson AGX Orin 64GB"), ("rtx-40", "GeForce RTX 4090")])
def test_a_bundle_for_another_device_says_to_copy_it_there(export, requests, name, device):
    result = export("mini-llava", "--keep", "32", "--target", name)
    last = result.stdout.splitlines()[-1]
    assert last.split(maxsplit=1)[0] == "next"
    assert last.endswith(f"copy 'my model-k32-cpu' to the {device} and run there: sh 'my model-k32-cpu/build.sh'")


def test_a_bundle_for_this_machine_says_to_build_it_here(export, requests, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "DEVICE_TREE", tmp_path / "model")
    (tmp_path / "model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    result = export("mini-llava", "--keep", "32")
    assert result.stdout.splitlines()[-1].endswith(" svdprune build 'my model-k32-cpu'")


def test_auto_says_what_it_found(export, requests, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "DEVICE_TREE", tmp_path / "none")
    monkeypatch.setattr(machine, "_nvidia_gpus", lambda: [("NVIDIA GeForce RTX 4070", 89)])
    result = export("mini-llava", "--keep", "32")
    assert requests[0].target == "rtx-40" and "target rtx-40: found NVIDIA GeForce RTX 4070 (sm 89)" in result.stderr


def test_keep_is_asked_for_except_where_nothing_is_dropped(export, requests):
    failed(export("mini-llava"), 2, "--keep 32", "--keep 10%")
    assert requests == []
    assert export("mini-llava", "--select", "none", "--target", "cpu").exit_code == 0
    assert requests[0].select == "none"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "jetson-orinn"), ("unknown target", "did you mean jetson-orin")),
        (("--target", "gameboy"), ("unknown target", "jetson-thor")),
    ],
)
def test_refused_at_the_door(export, requests, options, words):
    failed(export("mini-llava", "--keep", "32", *options), 2, *words)
    assert requests == []


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "fp4"),
        ("--rank", "0"),
        ("--variance", "0"),
        ("--variance", "1.5"),
        ("--seed", "-1"),
        ("--rank", "x"),
        ("--decoder-engine", "yes"),
        ("--cache", "0"),
    ],
)
def test_values_no_option_takes_are_usage_errors(export, requests, options):
    result = export("mini-llava", "--keep", "32", *options)
    assert result.exit_code == 2 and options[0] in result.stderr and requests == []


def test_the_exporters_errors_are_one_sentence(export, monkeypatch):
    def refuse(request, progress, say):
        raise UserError("there is no model 'x': known names are mini-llava, llava")

    monkeypatch.setattr(exporter, "export_model", refuse)
    failed(export("x", "--keep", "32", "--target", "cpu"), 2, "there is no model 'x'")


def test_ctrl_c_leaves_with_130(export, monkeypatch):
    def interrupted(request, progress, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "export_model", interrupted)
    failed(export("mini-llava", "--keep", "32", "--target", "cpu"), 130, "stopped")


@pytest.mark.parametrize("module", ["torch", "onnxscript"])
def test_a_missing_package_names_the_extra(module):
    script = WITHOUT.format(module=module, arguments=["mini-llava", "--keep", "32", "--target", "cpu"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        f"svdprune: exporting needs the package `{module}`, which is not installed: pip install 'svdprune[export]'"
    )


def test_both_scripts_export_the_same():
    helps = []
    for name, arguments in (("main", ["export", "--help"]), ("main_export", ["--help"])):
        script = [sys.executable, "-c", f"from svdprune.runtime.cli import {name}; {name}()", *arguments]
        helps.append(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    options = [re.findall(r"^  --[\w-]+", text, re.M) for text in helps]
    assert options[0] == options[1] and "  --keep" in options[0]
    assert load_command("export").name == "export"
