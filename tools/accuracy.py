"""Accuracy of `mini-llava` (or another checkpoint of its kind) on fresh drawn scenes, by question kind,
selector, count of kept tokens and position policy.

    python -m tools.accuracy --checkpoint exporter/models/mini-llava --pictures 1000            # unpruned
    python -m tools.accuracy --checkpoint exporter/models/mini-llava --pictures 300 --keep 128,64,32,16

An answer counts when every greedy token, the end token included, is the expected one. Greedy decoding gives
exactly the expected tokens if and only if, fed the expected tokens, the model's most likely next token is
each time the next expected one: so one forward pass judges an answer.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import track

from svdprune.calib.scenes import KINDS, Question, ask, draw_scene
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.processor import image_token, image_values
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices, selector_names
from svdprune.runtime.positions import POLICIES, Layout, picture_place
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.text import TextProcessor
from tools.tables import write_between

Judged = dict[tuple[str, int, str], dict[str, list[bool]]]  # (selector, K, positions) -> kind -> right or wrong


class Model:
    """A checkpoint in torch float32, with its vision part cut as the exporter cuts it."""

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint(folder)
        self.family = family_of(self.checkpoint.config, str(folder))
        self.spec = self.family.describe(self.checkpoint)
        self.encoder = self.family.encoder(self.checkpoint).float()
        self.projector = self.family.projector(self.checkpoint).float()
        self.reference = load_reference(self.checkpoint, click.echo)
        self.language = self.reference.model.language_model
        settings = self.checkpoint.json("tokenizer_config.json") or {}
        token_id = image_token(self.checkpoint)
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.text = TextProcessor(
            tokenizer, template, "<image>", token_id, settings["bos_token"], settings["eos_token"]
        )
        self.images = ImageSettings.from_json(image_values(self.checkpoint))

    def judge(self, asked: list[Question], kept: np.ndarray, features: torch.Tensor, positions: str) -> list[bool]:
        """Whether each question is answered exactly, from features (K, H) of the tokens `kept` (K,)."""
        turns = [self._turn(q) for q in asked]
        longest = max(len(ids) for ids, _ in turns)
        embed = self.language.get_input_embeddings()
        rows, places = [], []
        for ids, _ in turns:
            ids = ids + [0] * (longest - len(ids))  # padding follows the answer and is never looked at
            place = picture_place(ids, self.text.image_token_id)
            layout = Layout(place, kept, self.spec.tokens, positions)  # type: ignore[arg-type]
            rows.append(torch.cat([embed(torch.tensor(ids[:place])), features, embed(torch.tensor(ids[place + 1 :]))]))
            places.append(torch.from_numpy(layout.span(0, longest)))
        stacked = torch.stack(rows)
        hidden = self.language(
            inputs_embeds=stacked,
            position_ids=torch.stack(places),
            attention_mask=torch.ones(stacked.shape[:2], dtype=torch.long),
        ).last_hidden_state
        right = []
        for (ids, answer), state in zip(turns, hidden, strict=True):
            end = len(ids) - 1 + len(kept)  # rows before padding
            best = self.reference.lm_head(state[end - len(answer) - 1 : end - 1]).argmax(-1).tolist()
            right.append(best == answer)
        return right

    def _turn(self, q: Question) -> tuple[list[int], list[int]]:
        """Prompt and answer as ids, and how the answer alone reads."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": q.answer}]}
        prompt = self.text.prompt_ids([user])
        whole = self.text.prompt_ids([user, reply], add_generation_prompt=False)
        return whole, whole[len(prompt) :]


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    z, p = 1.96, right / of
    middle, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


@torch.no_grad()
def measure(
    model: Model, pictures: int, seed: str, keeps: list[int], selectors: list[str], policies: list[str]
) -> Judged:
    """Every wished combination on the same pictures and questions, one question of each kind a picture allows."""
    judged: Judged = defaultdict(lambda: defaultdict(list))
    scorers = {
        (name, keep): build_selector(
            SelectorConfig(name=name),
            tokens=model.spec.tokens,
            channels=model.spec.channels,
            grid=model.spec.grid,
            keep=keep,
        )
        for name in selectors
        for keep in keeps
    }
    everything = np.arange(model.spec.tokens)
    for number in track(range(pictures), "pictures"):
        rng = random.Random(f"{seed}:{number}")
        scene = draw_scene(rng, label_share=0.7)
        asked = [q for kind in KINDS if (q := ask(rng, scene, kind)) is not None]
        pixels = normalise(preprocess(scene.image, model.images), model.images)
        tokens, attention = model.encoder(torch.from_numpy(pixels)[None])
        features = model.projector(tokens)[0]
        runs = [(("none", model.spec.tokens, "compact"), everything)]
        for (name, keep), scorer in scorers.items():
            kept = keep_indices(scorer(tokens, attention)[0].numpy(), keep)
            runs += [((name, keep, policy), kept) for policy in policies]
        for key, kept in runs:
            right = model.judge(asked, kept, features[kept], key[2])
            for q, r in zip(asked, right, strict=True):
                judged[key][q.kind].append(r)
    return judged


def table(judged: Judged) -> str:
    """Markdown: a row a combination, a column a kind; the last columns are all questions and their 95 % interval."""
    lines = [f"| selector | K | positions | {' | '.join(KINDS)} | all | 95 % |", "|---" * (len(KINDS) + 5) + "|"]
    for (name, keep, policy), kinds in judged.items():
        shares = [f"{np.mean(kinds[k]):.3f}" if kinds[k] else "-" for k in KINDS]
        every = [r for k in KINDS for r in kinds[k]]
        low, high = wilson(sum(every), len(every))
        lines.append(
            f"| {name} | {keep} | {policy} | {' | '.join(shares)} | **{np.mean(every):.3f}** | {low:.3f}-{high:.3f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--pictures", default=1000, show_default=True)
@click.option("--seed", default="held-out", show_default=True, help="Training draws from other seeds.")
@click.option("--keep", default="", help="Counts of kept tokens, as in 128,64,32,16; empty: the unpruned model alone.")
@click.option("--selectors", default="", help="As in leverage,grid; empty: all.")
@click.option("--positions", default=",".join(POLICIES), show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose table is replaced.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), default=None)
def main(
    checkpoint: Path,
    pictures: int,
    seed: str,
    keep: str,
    selectors: str,
    positions: str,
    threads: int,
    write: Path | None,
    as_json: Path | None,
) -> None:
    torch.set_num_threads(threads)
    keeps = [int(k) for k in keep.split(",") if k]
    names = [n for n in selectors.split(",") if n] or [n for n in selector_names() if n != "none"]
    judged = measure(Model(checkpoint), pictures, seed, keeps, names, positions.split(","))
    questions = sum(len(v) for v in next(iter(judged.values())).values())
    text = f"{pictures} pictures, {questions} questions, seed `{seed}`.\n\n{table(judged)}"
    click.echo(text)
    if write is not None:
        write_between(write, "accuracy-pruned" if keeps else "accuracy", text)
    if as_json is not None:
        rows = [{"selector": n, "keep": k, "positions": p, "kinds": v} for (n, k, p), v in judged.items()]
        as_json.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
