"""Draw the demo's picture and print a question about it; its right answer goes to stderr.

python tools/demo_picture.py build/demo.png [--seed N] [--kind color]
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from svdprune.calib.scenes import KINDS, Question, Scene, ask, draw_scene

DEMO_SEED = 7
TRIES = 100  # not every scene allows every kind of question


def draw(seed: int, kind: str) -> tuple[Scene, Question]:
    """The first scene of the seed's sequence about which a question of ``kind`` can be asked."""
    rng = random.Random(seed)
    for _ in range(TRIES):
        scene = draw_scene(rng)
        question = ask(rng, scene, kind)
        if question is not None:
            return scene, question
    raise SystemExit(f"no question of the kind {kind} in {TRIES} scenes of seed {seed}: choose another seed")


def main() -> None:
    """Write the picture, print the question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seed", type=int, default=DEMO_SEED)
    parser.add_argument("--kind", choices=KINDS, default="color")
    arguments = parser.parse_args()
    scene, question = draw(arguments.seed, arguments.kind)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    scene.image.save(arguments.picture)
    print(question.text)
    print(f"the right answer is: {question.answer}", file=sys.stderr)


if __name__ == "__main__":
    main()
