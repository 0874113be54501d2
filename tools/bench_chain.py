"""The whole chain at all vision tokens and at K of them, beside what else runs the same model on a CPU.

    python -m tools.bench_chain --write docs/performance.md                        # the shipped model
    python -m tools.bench_chain --model 0.5b --write docs/performance.md           # true shapes, random weights
    python -m tools.bench_chain --model 1.5b --precision int4 --keep all,32

Picture and question in, `--tokens` tokens out, each contender in a process of its own, in turn. First token: from the
picture's file to the first token, preprocessing included; each call has a picture of its own, since some keep what they
computed of a prompt they have seen. Tokens/s: those after the first, which is decode alone. KV: the prompt's rows, as
bytes of keys and values. Peak: the process's largest resident memory, files mapped into it included. `by FLOPs` is the
time to first token at K that the count of FLOPs (`svdprune estimate`'s) makes of the measured one at all tokens; the
selection, which it counts too, and the question's rows are in it.

0.5b and 1.5b are made by tools/random_llava.py. Peers get the whole model with all its tokens, since none of them
prunes a LLaVA: transformers in torch with SDPA (fp32), OpenVINO GenAI where `--openvino FOLDER/<model>-<precision>` has
what optimum-intel made of the checkpoint, run by `--peers`.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress

from tools.tables import write_between
from tools.turns import CLOCKS, Figures, Turn, in_turn, peak_memory, serve

Clock = Callable[[], float]
MODELS = ("mini-llava", "0.5b", "1.5b")
PRECISIONS = ("fp32", "int4")
KEEPS = "all,128,64,32,16"
QUESTION = "What color is the large circle?"
PROCESSOR = ", seconds of the processor (other programs ran, too)"


def checkpoint_of(model: str, folder: Path) -> Path:
    """The checkpoint's folder; a random one is made the first time."""
    from svdprune.exporter.source import shipped_folder
    from tools.random_llava import make

    if model == MODELS[0]:
        return shipped_folder()
    place = folder / f"checkpoint-{model}"
    if not (place / "model.safetensors").exists():
        partial = place.with_name(f"{place.name}.partial")
        make(model, partial)
        partial.rename(place)
    return place


def prepare(model: str, folder: Path, precisions: list[str], keeps: list[str]) -> None:
    """Bundles of every precision and K that are not there yet, in ``folder``; those of one decoder have it once.

    One real export of the shipped model gives the processor and a golden case, which then is another bundle's: a 1.5B
    model in transformers, which answers an export's golden question, is more than many machines have room for.
    """
    import torch

    from svdprune.exporter.export import ExportRequest, export_model

    torch.set_num_threads(1)
    source, base = checkpoint_of(model, folder), folder / "base"
    if not base.exists():
        export_model(ExportRequest(MODELS[0], "32", target="cpu", out=base, report=False))
    for precision in precisions:
        first: Path | None = None
        for keep in keeps:
            out = folder / f"{model}-{precision}-{keep}"
            if not out.exists():
                _bundle(base, out, source, precision, keep, first)
            first = first or out


def _bundle(base: Path, out: Path, source: Path, precision: str, keep: str, decoder_of: Path | None) -> None:
    """A bundle of the checkpoint ``source`` with the files of ``base`` that are neither graph; see ``prepare``."""
    from svdprune.exporter.checkpoint import Checkpoint
    from svdprune.exporter.decoder import export_decoder
    from svdprune.exporter.families import family_of
    from svdprune.exporter.selection import SelectorConfig
    from svdprune.exporter.vision import build_vision, save_graph
    from svdprune.runtime.bundle import open_bundle, write_bundle
    from svdprune.runtime.manifest import SelectorInfo

    given, checkpoint = open_bundle(base, verify=False), Checkpoint(source)
    family = family_of(checkpoint.config, str(source))
    spec = family.describe(checkpoint)
    selector = SelectorConfig("none" if keep == "all" else "leverage")
    count = spec.tokens if keep == "all" else int(keep)
    with write_bundle(out) as bundle:
        for name in given.manifest.files:
            if name.partition("/")[0] in ("processor", "golden"):
                bundle.link(name, given)
        save_graph(build_vision(checkpoint, family, spec, selector, count), bundle.file("vision.onnx"))
        if decoder_of is None:
            decoder = export_decoder(checkpoint, checkpoint.config["text_config"], bundle.path / "decoder", precision)
        else:
            other = open_bundle(decoder_of, verify=False)
            decoder = other.manifest.decoder
            for name in other.manifest.files:
                if name.startswith("decoder/"):
                    bundle.link(name, other)
        vision = dataclasses.replace(
            given.manifest.vision,
            grid=list(spec.grid),
            tokens=spec.tokens,
            keep=count,
            channels=spec.channels,
            hidden=spec.hidden,
            tap=spec.tap,
            selector=SelectorInfo(**selector.manifest_fields()),  # type: ignore[arg-type]
        )
        bundle.manifest = dataclasses.replace(given.manifest, vision=vision, decoder=decoder)


def pictures() -> Iterator[Path]:
    """A picture as a file, another each time, the same ones for every contender."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "picture.png"
        for number in itertools.count():
            pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(file)
            yield file


def ours(place: str, folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], Figures]:
    """A bundle on ONNX Runtime."""
    from svdprune.runtime import load

    vlm = load(folder / place, threads=threads, verify=False)
    files, info = pictures(), vlm.manifest.decoder
    row_bytes = 2 * info.layers * info.kv_heads * info.head_dim * 4

    def call() -> Figures:
        picture = next(files)
        began = clock()
        sight = vlm.see(picture)
        prompt = vlm.cached_prompt(sight)
        logits = prompt.advance(vlm.prompt_ids(QUESTION))
        first = clock() - began
        rows = prompt.rows
        for _ in range(tokens):  # an answer that ended by itself would end the measurement
            logits = prompt.push(int(logits.argmax()))
        rest = clock() - began - first
        return {"first": first, "whole": first + rest, "rows": rows, "kv": rows * row_bytes}

    return call


def transformers(place: str, folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], Figures]:
    """The checkpoint in torch, float32, SDPA."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    source = checkpoint_of(place, folder)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    processor, files, text = AutoProcessor.from_pretrained(source), pictures(), model.config.text_config
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4

    def generate(count: int) -> tuple[float, int]:
        file = next(files)
        began = clock()
        with torch.inference_mode():
            given = processor(images=Image.open(file), text=prompt, return_tensors="pt")
            model.generate(**given, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return clock() - began, given["input_ids"].shape[1]

    def call() -> Figures:
        first, rows = generate(1)
        whole, _ = generate(1 + tokens)
        return {"first": first, "whole": whole, "rows": rows, "kv": rows * row_bytes}

    return call


def openvino(place: str, folder: Path, tokens: int, threads: int, clock: Clock) -> Callable[[], Figures]:
    """What optimum-intel made of the checkpoint, in OpenVINO GenAI's VLM pipeline; it times itself."""
    import openvino as ov
    import openvino_genai as genai
    from PIL import Image

    pipeline = genai.VLMPipeline(place, "CPU", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT="f32")
    files = pictures()

    def generate(count: int) -> float:
        file = next(files)
        began = clock()
        picture = ov.Tensor(np.asarray(Image.open(file).convert("RGB"))[None])
        pipeline.generate(QUESTION, images=[picture], max_new_tokens=count, ignore_eos=True, do_sample=False)
        return clock() - began

    def call() -> Figures:
        return {"first": generate(1), "whole": generate(1 + tokens)}

    return call


KINDS: dict[str, Callable[[str, Path, int, int, Clock], Callable[[], Figures]]] = {
    "ours": ours,
    "transformers": transformers,
    "openvino": openvino,
}


def predicted(source: Path, rows: dict[str, float]) -> dict[str, float]:
    """FLOPs up to the first token by K, from the shapes: tower, selection, projector and the prompt's rows."""
    from svdprune.exporter.estimate.config import load_model
    from svdprune.exporter.estimate.costs import connector_work, decoder_work, format_of, vision_work
    from svdprune.exporter.estimate.counting import selection_work
    from svdprune.exporter.selection import SelectorConfig

    model, form = load_model(str(source)), format_of("fp32")
    flops = {}
    for keep, count in rows.items():
        kept = model.tokens if keep == "all" else int(keep)
        works = [*vision_work(model.tower, 1, form), *connector_work(model.connector, kept, form)]
        works += decoder_work(model.text, int(count), 0, 1, form)
        if keep != "all":
            works += selection_work(SelectorConfig(), model.tokens, model.selected_channels, kept, 1, (model.tokens, 1))
        flops[keep] = float(sum(work.flops for work in works))
    return flops


@dataclasses.dataclass(frozen=True)
class Contender:
    """A line of the table: who, which of ``KINDS``, what it opens, with which Python."""

    name: str
    kind: str
    place: str
    python: str
    keep: str = "all"


def contenders(
    model: str, precision: str, keeps: list[str], peers: str, openvino_folder: Path | None
) -> list[Contender]:
    """All of one model and precision that there are."""
    found = [Contender(f"ours, {k} tokens", "ours", f"{model}-{precision}-{k}", sys.executable, k) for k in keeps]
    if precision == "fp32":
        found.append(Contender("transformers, torch SDPA", "transformers", model, sys.executable))
    if openvino_folder is not None:
        place = openvino_folder / f"{model}-{precision}"
        if place.is_dir():
            found.append(Contender("OpenVINO GenAI", "openvino", str(place.resolve()), peers))
    return found


def lines_of(
    model: str,
    precision: str,
    given: list[Contender],
    folder: Path,
    tokens: int,
    threads: int,
    rounds: int,
    clock: str,
    alone: bool,
) -> list[str]:
    """The table's lines of one model in one precision."""
    by_name: dict[str, Turn] = {}
    failed: dict[str, str] = {}
    for together in [[one] for one in given] if alone else [given]:
        turns = []
        for contender in together:
            arguments = ["tools.bench_chain", "--worker", contender.kind, "--place", contender.place, "--folder"]
            arguments += [str(folder), "--tokens", str(tokens), "--threads", str(threads), "--clock", clock]
            turns.append(Turn.start(contender.name, arguments, threads, contender.python))
        failed |= in_turn(turns, rounds)
        by_name |= {turn.name: turn for turn in turns if turn.name not in failed}
    mine = {c.keep: by_name[c.name] for c in given if c.kind == "ours" and c.name in by_name}
    flops = predicted(checkpoint_of(model, folder), {k: turn.median("rows") for k, turn in mine.items()})
    whole = mine.get("all")
    lines = []
    for contender in given:
        if contender.name in failed:
            lines.append(f"| {model} {precision} | {contender.name} | failed: {failed[contender.name]} |" + " |" * 6)
            continue
        turn = by_name[contender.name]
        first = turn.median("first")
        rate = tokens / (turn.median("whole") - first)
        expected, ratio = "", ""
        if whole is not None:
            ratio = f"{first / whole.median('first'):.2f}"
            if contender.kind == "ours" and contender.keep != "all":
                by_flops = whole.median("first") * flops[contender.keep] / flops["all"]
                expected = f"{by_flops:.3f} ({first / by_flops - 1:+.0%})"
        has_rows = "rows" in turn.calls[0]
        kv = f"{turn.median('kv') / 2**20:.1f}" if has_rows else ""
        count = f"{turn.median('rows'):.0f}" if has_rows else ""
        peak = turn.calls[-1]["peak"] / 2**30
        lines.append(
            f"| {model} {precision} | {contender.name} | {first:.3f} | {ratio} | {expected} | {rate:.1f} | {count} | "
            f"{kv} | {peak:.2f} |"
        )
    return lines


def _named(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    if any(part != "all" and not (part.isdigit() and int(part)) for part in parts):
        raise click.BadParameter(f"'{value}' is not a list such as all,64,32")
    return parts


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(MODELS), default=MODELS[0], show_default=True)
@click.option("--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True, default=PRECISIONS)
@click.option("--keep", "keeps", default=KEEPS, show_default=True, callback=_named)
@click.option("--tokens", default=16, show_default=True, type=click.IntRange(min=1), help="Generated after the first.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True)
@click.option("--alone", is_flag=True, help="All calls of one before the next starts: models too large to be in turn.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps checkpoints and bundles.  [default: removed]")
@click.option("--peers", default=sys.executable, help="Python that has openvino-genai.  [default: this]")
@click.option("--openvino", "openvino_folder", type=click.Path(path_type=Path), help="Folder of converted models.")
@click.option("--write", type=click.Path(path_type=Path), help="Markdown file whose `chain-<model>` table is replaced.")
@click.option("--worker", type=click.Choice(tuple(KINDS)), hidden=True)
@click.option("--place", hidden=True)
def main(
    model: str,
    precisions: tuple[str, ...],
    keeps: list[str],
    tokens: int,
    threads: int,
    rounds: int,
    clock: str,
    alone: bool,
    folder: Path | None,
    peers: str,
    openvino_folder: Path | None,
    write: Path | None,
    worker: str | None,
    place: str | None,
) -> None:
    if worker is not None:
        assert place is not None and folder is not None
        _serve(KINDS[worker](place, folder, tokens, threads, CLOCKS[clock]))
        return
    lines = [
        f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}, {tokens} tokens after the first; "
        f"medians of {rounds} calls, {'one contender after the other' if alone else 'in turn'}"
        f"{PROCESSOR if clock == 'processor' else ''}.",
        "",
        "| model | contender | first token, s | beside all tokens | by FLOPs, s | tokens/s | prompt rows | KV, MiB "
        "| peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kept = folder or Path(tempfile.mkdtemp(prefix="svdprune-chain-"))
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with Progress(transient=True) as progress:
            task = progress.add_task("preparing", total=1 + len(precisions))
            prepare(model, kept, list(precisions), keeps)
            for precision in precisions:
                progress.update(task, description=f"{model} {precision}", advance=1)
                given = contenders(model, precision, keeps, peers, openvino_folder)
                lines += lines_of(model, precision, given, kept, tokens, threads, rounds, clock, alone)
    finally:
        if folder is None:
            shutil.rmtree(kept, ignore_errors=True)
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        write_between(write, f"chain-{model}", text)


def _serve(call: Callable[[], Figures]) -> None:
    """``serve`` with the process's peak memory in every answer."""

    def peak() -> Figures:
        figures: dict[str, Any] = call()
        return {**figures, "peak": peak_memory()}

    serve(peak)


if __name__ == "__main__":
    main()
