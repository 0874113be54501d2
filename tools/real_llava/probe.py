"""Which hidden state of the tower says most about the patch it stands for: python -m tools.real_llava.probe --help.

A linear read-out (ridge regression on normalised features) of the colour and shape of the object under a patch is
fitted on some drawn scenes and tried on others.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch.nn import functional as F

from tools.real_llava.align import WORDS, targets
from tools.real_llava.pictures import pixels, scene
from tools.real_llava.sources import VISION, fetched
from tools.real_llava.tower import read_tower

PENALTY = 30.0
GROUPS = ("color", "shape")


def read_out(fit: torch.Tensor, told: torch.Tensor, tried: torch.Tensor, words: int) -> torch.Tensor:
    """The likeliest word int64 (M,) of features (M, D), from features (N, D) whose words int64 (N,) are known."""
    ones = torch.ones(len(fit), 1)
    known = torch.cat([fit, ones], 1)
    square = known.T @ known + PENALTY * torch.eye(known.shape[1])
    weights = torch.linalg.solve(square, known.T @ F.one_hot(told, words).float())
    return (torch.cat([tried, torch.ones(len(tried), 1)], 1) @ weights).argmax(1)


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/real-llava"), show_default=True)
@click.option("--scenes", default=70, show_default=True)
@click.option("--held-out", default=20, show_default=True)
@torch.no_grad()
def main(work: Path, scenes: int, held_out: int) -> None:
    torch.set_num_threads(1)
    tower = read_tower(fetched(VISION, work / "packages"))
    states, wanted = [], []
    for number in range(scenes):
        image, picture = scene(number, "probe")
        hidden = tower(pixels(image)[None], output_hidden_states=True).hidden_states
        states.append(torch.stack([layer[0, 1:] for layer in hidden]))
        wanted.append(torch.from_numpy(targets(picture)))
    all_states, all_wanted = torch.stack(states), torch.stack(wanted)  # (S, layers, T, D), (S, T, 4)
    click.echo("| hidden state | color | shape | median norm | share of the mean direction |\n|---|---|---|---|---|")
    for layer in range(1, all_states.shape[1]):
        rows = all_states[:, layer]
        normal = F.layer_norm(rows, rows.shape[-1:])
        shown = []
        for place, group in enumerate(GROUPS):
            on = all_wanted[..., place] > 0
            fit, tried = on[:-held_out], on[-held_out:]
            told = all_wanted[:-held_out, :, place][fit]
            said = read_out(normal[:-held_out][fit], told, normal[-held_out:][tried], len(WORDS[group]))
            shown.append(f"{float((said == all_wanted[-held_out:, :, place][tried]).float().mean()):.3f}")
        norms = rows.norm(dim=-1)
        mean = float(rows.mean((0, 1)).norm() ** 2 / (norms**2).mean())
        name = f"{layer} (-{all_states.shape[1] - layer})"
        click.echo(f"| {name} | {' | '.join(shown)} | {float(norms.median()):.1f} | {mean:.2f} |")


if __name__ == "__main__":
    main()
