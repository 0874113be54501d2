"""Prompts of several pictures, chats that get more of them, and frames of videos, on the tiny bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from svdprune.runtime import load
from svdprune.runtime.errors import UserError
from svdprune.runtime.video import read_video, sampled
from svdprune.runtime.vlm import Vlm

PICTURES = [tiny.picture(seed) for seed in (1, 2, 3)]


@pytest.fixture
def vlm(bundle: Path) -> Vlm:
    return load(bundle, threads=1)


def greedy(vlm: Vlm, pictures: list[Image.Image], question: str, count: int) -> list[int]:
    """The answer by the NumPy reference: rows spliced by hand, original positions counted by hand."""
    ids, image = vlm.prompt_ids(question, len(pictures)), vlm.manifest.processor.image_token_id
    embed = tiny.weights()["embed"]
    rows, positions, where = [], [], 0
    seen = iter([tiny.reference_vision(vlm.see(picture).pixels) for picture in pictures])
    for token in ids:
        if token == image:
            features, kept, scores = next(seen)
            rows += list(features)
            positions += list(where + (kept if vlm.positions == "original" else np.arange(len(kept))))
            where += len(scores) if vlm.positions == "original" else len(kept)
        else:
            rows.append(embed[token])
            positions.append(where)
            where += 1
    answer: list[int] = []
    while len(answer) < count:
        logits = tiny.reference_logits(np.array(rows), np.array(positions))
        answer.append(int(logits.argmax()))
        rows.append(embed[answer[-1]])
        positions.append(positions[-1] + 1)
        if answer[-1] in vlm.manifest.decoder.eos:
            break
    return answer


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_answers_about_several_pictures_are_the_references(bundle: Path, policy: str) -> None:
    vlm = load(bundle, threads=1, positions=policy)
    answer = vlm.ask(PICTURES, "Which is bright?", max_new_tokens=6)
    assert answer.token_ids == greedy(vlm, PICTURES, "Which is bright?", 6)
    assert answer.pictures == [tiny.TOKENS] * 3 and answer.tokens.vision_kept == 3 * tiny.KEEP
    kept = [vlm.see(picture).kept_indices for picture in PICTURES]
    np.testing.assert_array_equal(
        answer.kept_indices, np.concatenate([k + tiny.TOKENS * n for n, k in enumerate(kept)])
    )
    turned = vlm.ask(PICTURES[::-1], "Which is bright?", max_new_tokens=6)
    assert turned.tokens.prompt == answer.tokens.prompt
    assert [vlm.ask(picture, "What?", max_new_tokens=1).pictures for picture in PICTURES] == [[tiny.TOKENS]] * 3


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_a_picture_of_a_later_turn_is_as_if_all_were_prefilled(bundle: Path, policy: str) -> None:
    vlm = load(bundle, threads=1, positions=policy)
    chat = vlm.chat(PICTURES[0])
    first = chat.ask("What is it?", max_new_tokens=4)
    second = chat.ask("And these?", max_new_tokens=4, images=PICTURES[1:])
    assert len(chat.sights) == 3 and second.pictures == [tiny.TOKENS] * 3
    assert (first.times.vision > 0, second.times.vision > 0) == (True, True)
    third = chat.ask("And now?", max_new_tokens=4)
    assert third.times.vision == 0
    prompt = vlm.cached_prompt(chat.sights)
    logits = prompt.advance(vlm.text.prompt_ids([*chat.messages[:-2], chat.messages[-2]]))
    assert int(logits.argmax()) == third.token_ids[0]


def test_a_closed_turn_takes_its_picture_with_it(vlm: Vlm) -> None:
    chat = vlm.chat(PICTURES[0])
    chat.ask("What is it?", max_new_tokens=2)
    stream = chat.ask("And this?", stream=True, max_new_tokens=8, images=PICTURES[1])
    stream.close()
    assert len(chat.sights) == 1
    other = chat.ask("And this?", max_new_tokens=4, images=PICTURES[2])
    fresh = vlm.chat(PICTURES[0])
    fresh.ask("What is it?", max_new_tokens=2)
    assert fresh.ask("And this?", max_new_tokens=4, images=PICTURES[2]).token_ids == other.token_ids


def test_no_pictures_and_a_template_for_one(vlm: Vlm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture: give one or more"):
        vlm.ask([], "What?")
    once = "{{ bos_token }}USER: {{ image_token }} {{ messages[-1]['content'][-1]['text'] }} ASSISTANT: "
    single = load(tiny.make_bundle(tmp_path / "single", template=once), threads=1)
    with pytest.raises(UserError, match="1 place for the pictures, 2 pictures must be in it"):
        single.ask(PICTURES[:2], "What?")


def test_frames_are_spread_as_transformers_spreads_them() -> None:
    assert sampled(range(10), 4) == [0, 2, 5, 7] and sampled(range(3), 8) == [0, 1, 2] and sampled(range(9), 1) == [0]


def test_an_animation_and_a_folder_give_the_same_frames(tmp_path: Path) -> None:
    frames = [tiny.picture(seed, (24, 18)) for seed in range(12)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")  # 10.png sorts before 2.png as text
    (tmp_path / "frames" / "notes.txt").write_text("no frame")
    for source in ("a.webp", "frames"):
        read = read_video(tmp_path / source, 5)
        assert [np.array_equal(one, frames[n]) for one, n in zip(read, (0, 2, 4, 7, 9), strict=True)] == [True] * 5


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny.picture().save(tmp_path / "still.png")
    (tmp_path / "text.gif").write_text("no picture")
    for name, words in {
        "empty": "holds no pictures",
        "still.png": "has one frame",
        "text.gif": "not a picture",
        "absent.gif": "there is no picture at",
        "film.mp4": "needs a video decoder",
    }.items():
        with pytest.raises(UserError, match=words):
            read_video(tmp_path / name, 4)
    with pytest.raises(UserError, match="0 frames"):
        read_video(tmp_path, 0)
