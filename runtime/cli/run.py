"""``svdprune run``: ask a bundle about pictures, or about a video."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdprune.runtime.cli.app import Command
from svdprune.runtime.cli.options import backend_options
from svdprune.runtime.cli.show import print_json
from svdprune.runtime.errors import UserError
from svdprune.runtime.video import read_video

if TYPE_CHECKING:
    from svdprune.runtime.answer import Answer, AnswerStream, Sight
    from svdprune.runtime.vlm import Vlm


FRAMES = 8


@click.command("run", cls=Command, short_help="Ask a bundle about a picture.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, metavar="PATH", help="The picture; again for more in one prompt.")
@click.option("--video", metavar="PATH", help="In place of pictures: an animated GIF or WebP, or a folder of frames.")
@click.option(
    "--frames", type=click.IntRange(min=1), metavar="N", help=f"Evenly spaced frames of the video.  [default: {FRAMES}]"
)
@click.option("--prompt", metavar="TEXT", help="The question; without it, a chat about the picture begins.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the kept tokens and their scores here.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer, kept tokens, counts and times as JSON.")
@click.option("--max-new-tokens", type=int, help="Longest answer.  [default: the bundle's]")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: the bundle's]")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens that hold this share.")
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens; 0 is all.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--positions", metavar="POLICY", help="compact or original.  [default: the bundle's]")
@backend_options
def command(
    bundle: Path,
    images: tuple[str, ...],
    video: str | None,
    frames: int | None,
    prompt: str | None,
    picture: Path | None,
    as_json: bool,
    positions: str | None,
    vision_backend: str,
    decoder_backend: str,
    checkpoint: str | None,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Answer a question about pictures with BUNDLE. The answer streams to stdout, everything else goes to stderr."""
    from svdprune.runtime.vlm import load

    if bool(images) == (video is not None):
        raise UserError("what is the question about? Give --image (once for each picture), or --video")
    if frames is not None and video is None:
        raise UserError("--frames is of a --video: leave it out")
    if prompt is None and (as_json or not _on_terminal()):
        raise UserError("there is no question: give --prompt, or run on a terminal to chat")
    if picture is not None:
        from svdprune.runtime.picture import check_picture_path

        check_picture_path(picture)  # before the work, not after it
    shown = None if video is None else read_video(video, frames or FRAMES)
    with load(bundle, vision_backend, decoder_backend, threads, positions, checkpoint=checkpoint) as vlm:
        sights = vlm.see_all(images) if shown is None else vlm.see_video(shown)
        if prompt is None:
            _draw(vlm, sights, picture, "")
            _converse(vlm, sights, sampling)
            return
        stream = vlm.ask(sights, prompt, stream=True, **sampling)
        answer = stream.answer if as_json else _print_stream(stream)
        _draw(vlm, sights, picture, f"{prompt}\n{answer.text}")
        if as_json:
            print_json(_as_json(vlm, prompt, answer, sights, picture))
        else:
            click.echo(_summary(answer), err=True)
            if picture is not None:
                click.echo(f"kept tokens: {picture}", err=True)


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _converse(vlm: Vlm, sights: list[Sight], sampling: dict[str, Any]) -> None:
    """Questions from the terminal until an empty line or the end of input; no picture is encoded again."""
    chat = vlm.chat(sights)
    what = "the picture" if len(sights) == 1 else f"the {len(sights)} pictures"
    click.echo(f"Ask about {what}; `/image PATH` adds one to the next question, an empty line ends.", err=True)
    more: list[str] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if not question:
            return
        command, _, path = question.partition(" ")
        if command == "/image":
            more.append(path.strip())
            continue
        try:
            stream = chat.ask(question, stream=True, images=more or None, **sampling)
        except UserError as error:  # a path that was mistyped does not end the conversation
            click.echo(str(error), err=True)
        else:
            _print_stream(stream)
        more = []


def _print_stream(stream: AnswerStream) -> Answer:
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()
    return stream.answer


def _draw(vlm: Vlm, sights: list[Sight], path: Path | None, caption: str) -> None:
    """Every picture below the one before it; the caption is under the last."""
    if path is None:
        return
    from svdprune.runtime.picture import kept_picture, kept_views, save_picture, stacked

    rows, columns = vlm.manifest.vision.grid
    drawn = []
    for number, sight in enumerate(sights, 1):
        words = caption if number == len(sights) else ""
        if sight.tiled is not None:
            drawn.append(kept_views(sight.tiled.views, sight.scores, sight.kept_indices, words))
        else:
            drawn.append(kept_picture(sight.pixels, sight.scores, sight.kept_indices, (rows, columns), words))
    save_picture(stacked(drawn), path)


def _summary(answer: Answer) -> str:
    """One line: tokens, and how long they took."""
    tokens, times = answer.tokens, answer.times
    of = "" if len(answer.pictures) == 1 else f" of {len(answer.pictures)} pictures"
    line = (
        f"{tokens.vision_kept} of {tokens.vision_total} vision tokens{of}, prompt of {tokens.prompt}; "
        f"first token after {times.first_token:.2f} s (vision {times.vision:.2f} s, prefill {times.prefill:.2f} s)"
    )
    if times.decode:
        line += f", then {len(times.decode) / sum(times.decode):.1f} tokens/s"
    return line + (f"; cut at {tokens.generated} tokens" if answer.stopped == "length" else "")


def _as_json(vlm: Vlm, question: str, answer: Answer, sights: list[Sight], picture: Path | None) -> dict[str, Any]:
    times, tiles = answer.times, vlm.manifest.vision.tiles
    return {
        "question": question,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "stopped": answer.stopped,
        "kept_indices": answer.kept_indices.tolist(),
        "scores": [float(score) for score in answer.scores],
        "grid": vlm.manifest.vision.grid,
        "positions": vlm.positions,
        "budget": "picture" if tiles is None else tiles.budget,
        "pictures": [
            {
                "tokens": len(sight.scores),
                "rows": len(sight.places),
                "kept_indices": sight.kept_indices.tolist(),
                "scores": [float(score) for score in sight.scores],
            }
            for sight in sights
        ],
        "tokens": dataclasses.asdict(answer.tokens),
        "seconds": {**dataclasses.asdict(times), "first_token": times.first_token, "total": times.total},
        "picture": None if picture is None else str(picture),
    }
