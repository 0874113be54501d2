"""Train `mini-llava` from nothing and write it as a Hugging Face checkpoint.

    python -m tools.mini_llava --work build/mini-llava --out exporter/models/mini-llava

Seeded; stop it at any time and the same command goes on where it was. Each stage saves every few minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import LlavaForConditionalGeneration

from tools.mini_llava import converse, pretrain
from tools.mini_llava.fit import fit
from tools.mini_llava.model import FEATURE_LAYER, GRID, build
from tools.mini_llava.text import ASSISTANT, BOS, EOS, IMAGE, PAD, USER, processor, train_tokenizer


@dataclass(frozen=True)
class Stage:
    """One leg of the training: what is trained, on windows of how many patches a side (batch about), for how long."""

    name: str
    windows: tuple[int, ...]
    batch: int
    steps: int
    rate: float
    decay_share: float = 0.0
    talk: bool = False  # questions and answers, through the language model
    tower: bool = True  # the vision tower is trained
    dense_weight: float = 1.0
    turns: int = 8  # questions about a picture


STAGES = (
    Stage("dense", windows=(8,), batch=64, steps=1400, rate=2e-3),
    Stage("talk", windows=(8,), batch=64, steps=500, rate=2e-3, talk=True),
    Stage("wide", windows=(16,), batch=16, steps=300, rate=1.5e-3, talk=True),
    Stage(
        "full", windows=(GRID,), batch=8, steps=700, rate=7e-4, decay_share=0.6, talk=True, dense_weight=0.5, turns=16
    ),
    Stage(
        "language", windows=(GRID,), batch=8, steps=420, rate=1.2e-3, decay_share=0.8, talk=True, tower=False, turns=16
    ),
    Stage(
        "joint", windows=(GRID,), batch=8, steps=900, rate=9e-4, decay_share=0.9, talk=True, dense_weight=0.5, turns=16
    ),
    # Every other batch of fewer tokens: a language model that has only ever seen GRID x GRID of them goes on talking
    # after its answer when there are a few dozen. Whole windows, so no way of choosing tokens is favoured.
    Stage(
        "sizes", windows=(GRID, 6, GRID, 8, GRID, 12, GRID, 16), batch=8, steps=320, rate=5e-4, decay_share=1.0,
        talk=True, tower=False, turns=16,
    ),
)  # fmt: skip
TURN_LENGTH = 11  # tokens a question and its answer take, about; what does not fit is left out


def trained(model: LlavaForConditionalGeneration, heads: nn.Module, stage: Stage) -> list[tuple[str, nn.Parameter]]:
    """The parameters a stage changes. The layer after the tap never gets a gradient and keeps its first values."""
    tower = model.model.vision_tower
    unused = tuple(f"encoder.layers.{len(tower.encoder.layers) + 1 + i}." for i in range(FEATURE_LAYER, -1))
    found: list[tuple[str, nn.Parameter]] = []
    if stage.tower:
        for name, p in tower.named_parameters():
            if not name.startswith((*unused, "post_layernorm")):
                found.append((f"tower.{name}", p))
        found += [(f"heads.{n}", p) for n, p in heads.named_parameters()]
    if stage.talk:
        found += [(f"projector.{n}", p) for n, p in model.model.multi_modal_projector.named_parameters()]
        found += [(f"language.{n}", p) for n, p in model.model.language_model.named_parameters()]
    return found


def load_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/mini-llava"), show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Folder of the checkpoint; none: only train."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", default=2, show_default=True, help="Parts of a batch worked on at once on a CPU.")
@click.option(
    "--since",
    type=click.Choice([s.name for s in STAGES]),
    default=STAGES[0].name,
    show_default=True,
    help="First stage; with --init, what was learned before it.",
)
@click.option("--until", type=click.Choice([s.name for s in STAGES]), default=STAGES[-1].name, show_default=True)
@click.option(
    "--scale", default=1.0, show_default=True, help="Multiplies every stage's steps: 0.01 tries the recipe out."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Checkpoint whose weights to start from.")
def main(
    work: Path,
    out: Path | None,
    device: str,
    threads: int,
    since: str,
    until: str,
    scale: float,
    seed: int,
    init: Path | None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if device == "cpu":
        torch.set_num_threads(1)
    tokenizer_file = work / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file)
    ids = {t: tokenizer.token_to_id(t) for t in (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)}
    model = build(tokenizer.get_vocab_size(), ids[IMAGE], ids[BOS], ids[EOS], ids[PAD]).to(device)
    if init is not None:
        started = LlavaForConditionalGeneration.from_pretrained(init, dtype=torch.float32, local_files_only=True)
        model.load_state_dict(started.state_dict())
    heads = pretrain.Heads(model.config.vision_config.hidden_size).to(device)
    modules = {"model": model, "heads": heads}
    before: Path | None = None
    for stage in STAGES[[s.name for s in STAGES].index(since) :]:
        if before is not None and not (work / f"{stage.name}.pt").exists():
            state = torch.load(before, map_location=device, weights_only=True)["modules"]
            for name, module in modules.items():
                module.load_state_dict(state[name])
        before = work / f"{stage.name}.pt"
        if stage.talk:
            options = {
                "windows": stage.windows,
                "batch": stage.batch,
                "tokenizer": str(tokenizer_file),
                "turns": stage.turns,
                "length": stage.turns * TURN_LENGTH,
            }
            examples = pretrain.Examples(converse.example, f"{seed}:{stage.name}", 0, 0, **options)
            step = functools.partial(
                converse.loss,
                model,
                heads,
                tower=stage.tower,
                dense_weight=stage.dense_weight,
                start=(ids[BOS], ids[USER]),
            )
        else:
            windows = {"windows": stage.windows, "batch": stage.batch}
            examples = pretrain.Examples(pretrain.example, f"{seed}:{stage.name}", 0, 0, **windows)
            step = functools.partial(pretrain.loss, model, heads)
        fit(
            stage.name,
            modules,
            trained(model, heads, stage),
            examples,
            step,
            steps=max(1, round(stage.steps * scale)),
            batch=stage.batch,
            rate=stage.rate,
            decay_share=stage.decay_share,
            folder=work,
            device=device,
            workers=1,
            threads=threads if device == "cpu" else 1,
        )
        if stage.name == until:
            break
    if out is not None:
        save(model, tokenizer, out, [dataclasses.asdict(s) for s in STAGES])


def save(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, out: Path, recipe: list[dict[str, object]]
) -> None:
    """The checkpoint in Hugging Face layout, half precision, and the recipe it was made with."""
    model.to("cpu", torch.float16).save_pretrained(out)
    processor(tokenizer).save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"stages": recipe}, indent=2) + "\n", encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone; a wheel would carry that on
    click.echo(f"wrote {out}: {sum(p.stat().st_size for p in out.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
