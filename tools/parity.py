"""Does a bundle answer as transformers does? Greedy tokens, features and kept indices on drawn questions.

    python -m tools.parity --checkpoint exporter/models/mini-llava --bundle build/mini-llava-k32 --write docs/parity.md

The bundle is run by svdprune.runtime through its front door. The reference is transformers in float32, and shares
neither the position rules nor the decode loop of the runtime: for `compact` it is given the kept tokens alone and
numbers the rows itself; for `original` it is given all the vision tokens and an attention mask that hides the dropped
ones. Both sides use the kept indices of the bundle's graph; whether the reference would have kept the same is a line
of its own. Where two logits or two scores of the reference are within a hair of each other, a different choice is
called a tie and counted apart. A float32 bundle that differs anywhere else makes the command fail.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import track

from svdprune.calib.scenes import KINDS, Question, ask, draw_scene
from svdprune.exporter.calibrate.apply import bundle_start
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.exporter.golden import load_reference
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices
from svdprune.runtime import load
from svdprune.runtime.answer import Sight
from svdprune.runtime.positions import POLICIES, picture_place
from svdprune.runtime.preprocess import normalise
from svdprune.runtime.vlm import Vlm
from tools.tables import write_between

TIE = 1e-4  # between logits
SCORE_TIE = 1e-4  # between scores, as a share of the larger
COSINE = 0.9999  # below this, float32 features are not the reference's


@dataclass
class Tokens:
    """Answers compared under one position policy."""

    same: int = 0
    tie: int = 0
    different: list[str] = field(default_factory=list)
    right_bundle: int = 0
    right_reference: int = 0
    first_logits: float = 0.0  # largest difference of a first step


@dataclass
class Vision:
    """Features and choice compared, one entry a picture."""

    cosine: list[float] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)  # of the scores that the choices differ in; 0 where they do not


def compare(ours: list[int], reference: list[int], logits: np.ndarray) -> str:
    """`same`, `tie` or `different`, judged at the first token that differs.

    logits: the reference's, (steps, V), one row for each of its tokens. What follows a tie has another context on each
    side and is not compared.
    """
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=False)):
        if mine != theirs:
            return "tie" if logits[step, theirs] - logits[step, mine] < TIE else "different"
    return "same" if len(ours) == len(reference) else "different"


def score_gap(ours: np.ndarray, reference: np.ndarray, scores: np.ndarray) -> float:
    """How much better, by its own scores (T,), the reference's kept indices are than ours: 0 where they are the same.

    The largest difference between a token that it alone keeps and one that we alone keep, as a share of the larger.
    """
    missed, wrong = np.setdiff1d(reference, ours), np.setdiff1d(ours, reference)
    if not len(missed):
        return 0.0
    best, worst = float(scores[missed].max()), float(scores[wrong].min())
    return (best - worst) / max(abs(best), abs(worst)) if best != worst else float(np.finfo(np.float32).tiny)


class Reference:
    """transformers' model of a checkpoint, and the selector of a bundle in torch."""

    def __init__(self, folder: Path, vlm: Vlm) -> None:
        checkpoint = Checkpoint(folder)
        self.model: Any = load_reference(checkpoint, click.echo)
        if next(self.model.parameters()).dtype != torch.float32:
            raise click.ClickException("the reference does not fit the memory in float32: use a machine with more")
        self.family = family_of(checkpoint.config, str(folder))
        vision = vlm.manifest.vision
        self.keep, self.settings = vision.keep, vlm.settings
        given = {name: value for name, value in vars(vision.selector).items() if value is not None and name != "start"}
        spec = self.family.describe(checkpoint)
        self.scorer = build_selector(
            SelectorConfig(**given),
            tokens=spec.tokens,
            channels=spec.channels,
            grid=spec.grid,
            keep=vision.keep,
            start=bundle_start(vlm.bundle),
        )

    def see(self, pixels: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """uint8 (height, width, 3) -> projected features of all tokens (T, H), scores (T,)."""
        normalised = torch.from_numpy(normalise(pixels, self.settings))[None]
        tokens, attention = self.family.reference_tokens(self.model, normalised)
        return self.family.reference_project(self.model, tokens)[0], self.scorer(tokens, attention)[0].numpy()

    def rows(self, prompt: list[int], place: int, features: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, H) of a prompt with `features` in place of its picture token."""
        embedded = self.model.get_input_embeddings()(torch.tensor(prompt))
        return torch.cat([embedded[:place], features, embedded[place + 1 :]])

    def greedy(
        self, rows: torch.Tensor, seen: torch.Tensor, eos: list[int], limit: int
    ) -> tuple[list[int], np.ndarray]:
        """Tokens, the end token included, and logits (steps, V). Rows (n, H) are numbered 0, 1, 2, ...

        seen: int64 (n,), 0 for a row that must not be attended to.
        """
        tokens: list[int] = []
        steps = []
        cache, mask, new = None, seen, rows
        while len(tokens) < limit:
            out = self.model.model.language_model(
                inputs_embeds=new[None],
                attention_mask=mask[None],
                position_ids=torch.arange(len(mask) - len(new), len(mask))[None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(self.model.lm_head(out.last_hidden_state[0, -1]))
            tokens.append(int(steps[-1].argmax()))
            if tokens[-1] in eos:
                break
            new = self.model.get_input_embeddings()(torch.tensor(tokens[-1:]))
            mask = torch.cat([mask, torch.ones(1, dtype=mask.dtype)])
        return tokens, torch.stack(steps).numpy()


def questions(count: int, seed: str) -> list[tuple[Any, Question]]:
    """Pictures and questions, the kinds in turn, from seeds that no training draws from."""
    drawn: list[tuple[Any, Question]] = []
    number = 0
    while len(drawn) < count:
        rng = random.Random(f"{seed}:{number}")
        scene = draw_scene(rng, label_share=0.7)
        question = ask(rng, scene, KINDS[len(drawn) % len(KINDS)])
        if question is not None:
            drawn.append((scene.image, question))
        number += 1
    return drawn


@torch.no_grad()
def measure(
    vlm: Vlm, reference: Reference, asked: list[tuple[Any, Question]], limit: int
) -> tuple[Vision, dict[str, Tokens]]:
    """All comparisons on all questions, under both policies."""
    vision, tallies = Vision(), {policy: Tokens() for policy in POLICIES}
    for image, question in track(asked, "questions"):
        sight = vlm.see(image)
        features, scores = reference.see(sight.pixels)
        kept = keep_indices(scores, reference.keep)
        theirs = features[torch.from_numpy(sight.kept_indices)]
        mine = torch.from_numpy(sight.features)
        vision.cosine.append(float(torch.nn.functional.cosine_similarity(mine, theirs).min()))
        vision.difference.append(float((mine - theirs).abs().max()))
        vision.overlap.append(len(np.intersect1d(kept, sight.kept_indices)) / len(kept))
        vision.gap.append(score_gap(sight.kept_indices, kept, scores))
        for policy, tally in tallies.items():
            vlm.positions = policy
            _compare_answers(vlm, reference, sight, question, features, tally, limit)
    return vision, tallies


def _compare_answers(
    vlm: Vlm, reference: Reference, sight: Sight, question: Question, features: torch.Tensor, tally: Tokens, limit: int
) -> None:
    answer = vlm.ask(sight, question.text, max_new_tokens=limit, temperature=0.0)
    prompt = vlm.prompt_ids(question.text)
    place = picture_place(prompt, vlm.manifest.processor.image_token_id)
    kept = torch.from_numpy(sight.kept_indices)
    rows = reference.rows(prompt, place, features[kept] if vlm.positions == "compact" else features)
    seen = torch.ones(len(rows), dtype=torch.long)
    if vlm.positions == "original":
        seen[place : place + len(features)] = 0
        seen[place + kept] = 1
    tokens, logits = reference.greedy(rows, seen, vlm.manifest.decoder.eos, limit)
    outcome = compare(answer.token_ids, tokens, logits)
    if outcome == "same":
        tally.same += 1
    elif outcome == "tie":
        tally.tie += 1
    else:
        tally.different.append(f"{question.text} bundle {answer.text!r}, transformers {vlm.text.decode(tokens)!r}")
    tally.right_bundle += answer.text.strip() == question.answer
    tally.right_reference += (
        vlm.text.decode([t for t in tokens if t not in vlm.manifest.decoder.eos]).strip() == question.answer
    )
    first = vlm.first_logits(sight, question.text)
    tally.first_logits = max(tally.first_logits, float(np.abs(first - logits[0]).max()))


def report(vlm: Vlm, vision: Vision, tallies: dict[str, Tokens], seed: str) -> str:
    """Markdown: what was compared, the vision part, the answers."""
    manifest, count = vlm.manifest, len(vision.cosine)
    same = sum(o == 1.0 for o in vision.overlap)
    seen = f"K = {manifest.vision.keep} of {manifest.vision.tokens} by {manifest.vision.selector.name}"
    parts = f"vision {manifest.vision.precision}, decoder {manifest.decoder.precision}"
    lines = [
        f"`{manifest.model.id}`, {seen}, {parts}; {count} questions, seed `{seed}`.",
        "",
        "| vision | |",
        "|---|---|",
        f"| cosine of a feature with the reference's, mean of each picture's worst | {np.mean(vision.cosine):.7f} |",
        f"| the same, worst picture | {min(vision.cosine):.7f} |",
        f"| largest difference of a feature | {max(vision.difference):.1e} |",
        f"| pictures with the same kept indices | {same} of {count} |",
        f"| pictures that differ at a tie of scores | {sum(0 < g < SCORE_TIE for g in vision.gap)} |",
        f"| largest difference of scores chosen differently, as a share | {max(vision.gap):.1e} |",
        f"| mean overlap of the kept indices | {np.mean(vision.overlap):.4f} |",
        "",
        "| positions | same tokens | tie | other | largest difference of first logits | right: bundle | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy, t in tallies.items():
        lines.append(
            f"| {policy} | {t.same} of {count} | {t.tie} | {len(t.different)} | {t.first_logits:.1e} | "
            f"{t.right_bundle / count:.3f} | {t.right_reference / count:.3f} |"
        )
    return "\n".join(lines)


def failures(vlm: Vlm, vision: Vision, tallies: dict[str, Tokens]) -> list[str]:
    """What a float32 bundle must not show; nothing is asked of parts in another precision."""
    found = []
    if vlm.manifest.vision.precision == "fp32":
        if min(vision.cosine) < COSINE:
            found.append(f"the cosine of a feature is {min(vision.cosine):.6f}, below {COSINE}")
        if max(vision.gap) >= SCORE_TIE:
            found.append(f"{sum(g >= SCORE_TIE for g in vision.gap)} pictures have other kept indices, not by a tie")
        if vlm.manifest.decoder.precision == "fp32":
            found += [f"{policy}: {text}" for policy, tally in tallies.items() for text in tally.different]
    return found


@click.command(help=__doc__)
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--questions", "count", default=210, show_default=True)
@click.option("--seed", default="parity", show_default=True, help="Training draws from other seeds.")
@click.option("--max-new-tokens", "limit", default=16, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--write", type=click.Path(path_type=Path), default=None, help="Markdown file whose table is replaced.")
def main(checkpoint: Path, bundle: Path, count: int, seed: str, limit: int, threads: int, write: Path | None) -> None:
    torch.set_num_threads(threads)
    vlm = load(bundle, threads=threads)
    asked = questions(count, seed)
    vision, tallies = measure(vlm, Reference(checkpoint, vlm), asked, limit)
    text = report(vlm, vision, tallies, seed)
    click.echo(text)
    for policy, tally in tallies.items():
        for line in tally.different:
            click.echo(f"differs, {policy}: {line}")
    if write is not None:
        write_between(write, f"parity-{vlm.manifest.decoder.precision}", text)
    found = failures(vlm, vision, tallies)
    if found:
        raise click.ClickException(
            f"no parity: {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
        )


if __name__ == "__main__":
    main()
