"""The tokenizer, chat template and processor of `mini-llava`, and questions as token sequences."""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from svdprune.calib.scenes import KINDS, Question, Scene, ask, draw_scene
from svdprune.calib.scenes.draw import DIGITS, LETTERS
from tools.mini_llava.model import GRID, IMAGE_SIZE, PATCH_SIZE

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"
SPECIAL = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)
# A digit or a lone capital is a piece by itself, so that a label is read one character at a time.
PIECES = r" ?[A-Z0-9](?![a-z])| ?[A-Za-z]+|[^ A-Za-z0-9]+| +"
WEIGHTS = {"place": 2, "relation": 3, "detail": 2}  # of question kinds in training; 1 for the others
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'USER:' }}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ ' ' + part['text'] }}{%- endfor -%}
{%- else -%}
{{ 'ASSISTANT:' }}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ ' ' + part['text'] }}{%- endfor -%}
{{ '</s>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def train_tokenizer(seed: int = 0, pictures: int = 3000) -> Tokenizer:
    """Byte-level BPE over drawn questions; any text can be tokenised, the usual words are one token each."""
    rng = random.Random(seed)
    lines: list[str] = []
    for _ in range(pictures):
        scene = draw_scene(rng, 112, 112, (1, 2))
        scene = dataclasses.replace(scene, image=Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)))
        for kind in KINDS:
            if (q := ask(rng, scene, kind)) is not None:
                lines.extend((" " + q.text, " " + q.answer))
    lines.extend([f" {c}" for c in LETTERS + DIGITS] * 20)
    words = " zero one two three four five top middle bottom left center right above"
    lines.extend([words] * 20)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def processor(tokenizer: Tokenizer, image_size: int = IMAGE_SIZE) -> LlavaProcessor:
    """The Hugging Face processor: the tokenizer, CLIP's preprocessing at this model's size, the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=2048,
    )
    size = {"height": image_size, "width": image_size}
    image = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    return LlavaProcessor(
        image_processor=image,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def in_full_frame(scene: Scene, row: int, column: int) -> Scene:
    """The scene of a window whose first patch is at (row, column), in the coordinates of the full picture."""
    dx, dy = column * PATCH_SIZE, row * PATCH_SIZE
    moved = tuple(dataclasses.replace(o, x=o.x + dx, y=o.y + dy) for o in scene.objects)
    return dataclasses.replace(scene, image=_blank(), objects=moved)


@functools.lru_cache(maxsize=1)
def _blank() -> Image.Image:
    return Image.new("RGB", (GRID * PATCH_SIZE, GRID * PATCH_SIZE))


def questions(rng: random.Random, scene: Scene, wanted: int) -> list[Question]:
    """Up to `wanted` different questions; kinds that are learned late are drawn more often."""
    found: dict[str, Question] = {}
    for _ in range(3 * wanted):
        if len(found) == wanted:
            break
        q = ask(rng, scene, rng.choices(KINDS, [WEIGHTS.get(k, 1) for k in KINDS])[0])
        if q is not None:
            found.setdefault(q.text, q)
    return list(found.values())


def conversation(tokenizer: Tokenizer, asked: list[Question], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The turns after the picture as (ids, labels), int64 (length,): labels are -100 but on answers and their end."""
    user, assistant, eos, pad = (tokenizer.token_to_id(t) for t in (USER, ASSISTANT, EOS, PAD))
    ids: list[int] = []
    labels: list[int] = []
    for number, q in enumerate(asked):
        head = [] if number == 0 else [user]
        prompt = [*head, *tokenizer.encode(" " + q.text, add_special_tokens=False).ids, assistant]
        answer = [*tokenizer.encode(" " + q.answer, add_special_tokens=False).ids, eos]
        if len(ids) + len(prompt) + len(answer) > length:
            break
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    rest = length - len(ids)
    return np.array(ids + [pad] * rest), np.array(labels + [-100] * rest)
