"""Start-up and footprint of a bundle: a whole process to the first token, beside the bare work, and where memory goes.

    python -m tools.bench_start --write docs/performance.md

`svdprune run` asks for one token; `bare ONNX Runtime` is a script that only opens the two sessions and runs them on
arrays that lie ready: what any program must do. Both are whole processes, in turn, timed from outside; seconds of the
processor, of all threads, beside those of the clock. Memory is a process's that has opened the bundle and answered:
its own, and files mapped into it, which the system takes back when it needs room and which processes share.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from tools.tables import write_between
from tools.turns import ROOT

BARE = """
import json, sys
import numpy as np
import onnxruntime as ort
folder, threads = sys.argv[1], int(sys.argv[2])
given = np.load(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
vision, decoder = (
    ort.InferenceSession(f"{folder}/{part}", options, providers=["CPUExecutionProvider"])
    for part in ("vision.onnx", "decoder/model.onnx")
)
features, *_ = vision.run(None, {"pixels": given["pixels"]})
feed = {name: given[name] for name in given.files if name != "pixels"}
logits, *_ = decoder.run(None, feed)
print(int(logits[0, -1].argmax()), features.shape)
"""
MEMORY = """
import json, sys
from pathlib import Path
from svdprune.runtime import load
def now():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]
import onnxruntime
before = now()
vlm = load(sys.argv[1], threads=int(sys.argv[2]), verify=False)
opened = now()
vlm.ask(sys.argv[3], "What is this?", max_new_tokens=2)
print(json.dumps([before, opened, now()]))
"""


def seconds(command: list[str], threads: int) -> tuple[float, float]:
    """Clock and processor seconds of a process with its children.

    Raises:
        ClickException: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        spent = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise click.ClickException(f"{' '.join(command[:3])}: {said.read().decode()[-500:]}")
    return spent, used.ru_utime + used.ru_stime


def arrays(bundle: Path, picture: Path, out: Path) -> None:
    """What the bare script runs the two graphs on: the pixels, and the rows of a prompt with an empty cache."""
    from svdprune.runtime import load
    from svdprune.runtime.preprocess import open_image, preprocess

    with load(bundle, threads=1, verify=False) as vlm:
        info, keep = vlm.manifest.decoder, vlm.manifest.vision.keep
        rows = len(vlm.prompt_ids("What is this?")) - 1 + keep
        past = np.zeros((1, info.kv_heads, 0, info.head_dim), np.float32)
        names = [f"past_key_values.{i}.{part}" for i in range(info.layers) for part in ("key", "value")]
        np.savez(
            out,
            pixels=preprocess(open_image(picture), vlm.settings)[None],
            inputs_embeds=np.random.default_rng(0).standard_normal((1, rows, info.hidden), np.float32),
            attention_mask=np.ones((1, rows), np.int64),
            position_ids=np.arange(rows)[None],
            **dict.fromkeys(names, past),
        )


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: the shipped model, exported with K = 32]")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose `start` table is replaced.")
def main(bundle: Path | None, threads: int, rounds: int, write: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if bundle is None:
            bundle = folder / "bundle"
            script = Path(sys.executable).parent / "svdprune"
            export = [str(script), "export", "mini-llava", "--keep", "32", "--target", "cpu", "--no-report", "--out"]
            subprocess.run([*export, str(bundle)], check=True, capture_output=True)
        text = "\n".join(table(bundle.resolve(), folder, threads, rounds))
    click.echo(text)
    if write is not None:
        write_between(write, "start", text)


def table(bundle: Path, folder: Path, threads: int, rounds: int) -> list[str]:
    """The table's lines."""
    from tools.bench_chain import pictures

    drawn = pictures()  # holds the folder of its picture
    picture, given, bare = next(drawn), folder / "given.npz", folder / "bare.py"
    arrays(bundle, picture, given)
    bare.write_text(BARE)
    run = [str(Path(sys.executable).parent / "svdprune"), "run", str(bundle), "--image", str(picture), "--prompt"]
    ways = {
        "python, nothing imported": [sys.executable, "-c", "pass"],
        "import svdprune.runtime": [sys.executable, "-c", "import svdprune.runtime"],
        "import svdprune.runtime, and all that load needs": [
            *(sys.executable, "-c"),
            "from svdprune.runtime import load; import onnxruntime, tokenizers, jinja2, PIL.Image",
        ],
        "bare ONNX Runtime": [sys.executable, str(bare), str(bundle), str(threads), str(given)],
        "svdprune run": [*run, "What is this?", "--max-new-tokens", "1", "--threads", str(threads)],
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, command in ways.items():
            spent = seconds(command, threads)
            if number:  # the first brings files into memory
                found[way].append(spent)
    medians = {way: [median(column) for column in zip(*times, strict=True)] for way, times in found.items()}
    reference = medians["bare ONNX Runtime"][1]
    lines = [
        f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}; medians of {rounds} processes "
        "each, in turn.",
        "",
        "| process | clock, s | processor, s | beside bare |",
        "|---|---|---|---|",
    ]
    lines += [f"| {way} | {clock:.2f} | {cpu:.2f} | {cpu / reference:.2f} |" for way, (clock, cpu) in medians.items()]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(bundle), str(threads), str(picture)],
        check=True,
        capture_output=True,
        text=True,
    )
    before, opened, after = json.loads(done.stdout.splitlines()[-1])
    weights = sum(file.stat().st_size for file in bundle.rglob("*.onnx*"))
    lines += ["", "| memory, MB | own | mapped files |", "|---|---|---|"]
    for moment, (own, mapped) in (("imports", before), ("bundle opened", opened), ("answered", after)):
        lines.append(f"| {moment} | {own / 1e6:,.0f} | {mapped / 1e6:,.0f} |")
    lines += ["", f"The bundle's graphs with their weights are {weights / 1e6:,.0f} MB."]
    return lines


if __name__ == "__main__":
    main()
