"""Chat template, tokens and the streaming detokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.template import ChatTemplate
from svdprune.runtime.text import StreamDecoder, TextProcessor, assistant_message, user_message

LLAVA = (  # as in the hub's llava-1.5-7b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TURNS = [user_message("Was ist das?", True), assistant_message("Ein Hütchen."), user_message("Wo <i>genau</i>?", False)]
EXTRAS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}\n"
    "  {% if m.role == 'assistant' %}{% continue %}{% endif %}\n"
    "  {% set ns.n = ns.n + 1 %}\n"
    "{{ ns.n }} {{ m | tojson }} {{ dict(a=1) | tojson(indent=2) }}\n"
    "{% endfor %}{{ strftime_now('%%') }}{{ bos_token }}{{ tools is none }}"
)


def processor(template: str = tiny.TEMPLATE, tokenizer: Tokenizer | None = None) -> TextProcessor:
    return TextProcessor((tokenizer or tiny.tokenizer()).to_str(), template, "<image>", 3, "<s>", "</s>")


def test_llava_template() -> None:
    text = processor(LLAVA).render(TURNS)
    assert text == "USER: <image>\nWas ist das? ASSISTANT: Ein Hütchen. USER: Wo <i>genau</i>? ASSISTANT:"


@pytest.mark.parametrize("template", [LLAVA, tiny.TEMPLATE, EXTRAS])
@pytest.mark.parametrize("add", [True, False])
def test_rendering_is_transformers_(template: str, add: bool) -> None:
    reference = pytest.importorskip("transformers.utils.chat_template_utils", reason="the reference is not installed")
    rendered, _ = reference.render_jinja_template(
        [TURNS],
        chat_template=template,
        add_generation_prompt=add,
        bos_token="<s>",
        eos_token="</s>",
        image_token="<image>",
    )
    assert processor(template).render(TURNS, add) == rendered[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "broken at line 1"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[0].absent.deeper }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
    ],
)
def test_a_bad_or_hostile_template(template: str, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        processor(template).render(TURNS)


def test_prompt_ids_and_bos() -> None:
    """The tokenizer's own BOS is added unless the template wrote one: never none, never two."""
    tokenizer = tiny.tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for template in (LLAVA, "<s>" + LLAVA):
        ids = processor(template, tokenizer).prompt_ids(TURNS[:1])
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert ids.count(3) == 1
    assert 1 not in processor(LLAVA).prompt_ids(TURNS[:1])


PLACED = "{% for p in messages[0].content %}{{ '<picture>' if p.type == 'image' else p.text }}{% endfor %}"


def test_a_placeholder_becomes_the_text_around_the_picture() -> None:
    made = TextProcessor(
        tiny.tokenizer().to_str(), PLACED, "<image>", 3, placeholder="<picture>", picture="\n[<image>]\n"
    )
    ids = made.prompt_ids([user_message("Was?", True)])
    assert ids.count(3) == 1
    assert tiny.tokenizer().decode(ids, skip_special_tokens=False) == "\n[<image>]\nWas?"
    for question in ("What is a <picture>?", "What is <image> here?"):
        with pytest.raises(UserError, match="which is a control token"):
            made.check_question(question)
    # A placeholder may be the image token itself, with more around it.
    around = TextProcessor(tiny.tokenizer().to_str(), LLAVA, "<image>", 3, placeholder="<image>", picture="[<image>]")
    assert around.prompt_ids([user_message("Was?", True)]).count(3) == 1


@pytest.mark.parametrize(
    ("placeholder", "picture", "words"),
    [
        ("<picture>", None, "go together"),
        (None, "<image>", "go together"),
        ("", "<image>", "go together"),
        ("<picture>", "[]", "must hold the image token <image> once"),
        ("<picture>", "<image><image>", "must hold the image token <image> once"),
    ],
)
def test_a_placeholder_that_does_not_fit(placeholder: str | None, picture: str | None, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        TextProcessor(tiny.tokenizer().to_str(), PLACED, "<image>", 3, placeholder=placeholder, picture=picture)


def test_truncation_and_padding_saved_with_the_tokenizer_are_off() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    assert processor(LLAVA, tokenizer).prompt_ids(TURNS) == processor(LLAVA).prompt_ids(TURNS)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "question is empty"),
        (" \n", "question is empty"),
        (None, "must be text, not NoneType"),
        (b"What?", "must be text, not bytes"),
        ("What is <image> here?", "holds <image>, which is a control token"),
        ("Stop </s> now", "holds </s>"),
        ("a lone \udce9 surrogate", "not valid Unicode"),
    ],
)
def test_questions_that_cannot_be_asked(question: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        processor().check_question(question)


def test_a_question_may_not_spell_the_picture_s_place_another_way() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.normalizer = normalizers.Replace("[[picture]]", "<image>")
    tokenizer.add_tokens(["<image>"])
    made = processor(tokenizer=tokenizer)
    if 3 in tokenizer.encode("a [[picture]]", add_special_tokens=False).ids:
        with pytest.raises(UserError, match="reads as the picture's place"):
            made.check_question("a [[picture]]")
    for question in ("Was ist das? 你好 🙂 é\0", "USER: ASSISTANT:", "{{ 1 }} {% raise %}"):
        assert made.check_question(question) == question
        assert question in processor().render([user_message(question, True)])


def test_a_tokenizer_that_is_none_or_another() -> None:
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        TextProcessor("{}", LLAVA, "<image>", 3)
    with pytest.raises(BundleError, match="gives the image token <image> the id 3 and the manifest 7"):
        TextProcessor(tiny.tokenizer().to_str(), LLAVA, "<image>", 7)
    with pytest.raises(BundleError, match="the id None and the manifest 3"):
        TextProcessor(tiny.tokenizer().to_str(), LLAVA, "<picture>", 3)


def llama_tokenizer() -> Tokenizer:
    """SentencePiece's manner: a mark for spaces, bytes for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "▁cat": 4, "é": 5}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), llama_tokenizer()], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", ["a cat", "é 你好 🙂🙂 fin", "🇩🇪", "a\n\n  b ", " \ufffd ok", "ab\ufffd"])
def test_pieces_join_and_hold_no_half_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), llama_tokenizer()], ids=["byte-level", "byte-fallback"])
def test_random_tokens_join_too(tokenizer: Tokenizer) -> None:
    """Also where the bytes are no UTF-8 at all, and where the answer is cut inside a character."""
    import random

    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 30))]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_comes_while_it_streams() -> None:
    tokenizer = tiny.tokenizer()
    assert streamed(tokenizer, tokenizer.encode("né!").ids) == ["n", "", "é", "!", ""]
    assert streamed(tokenizer, tokenizer.encode("né").ids[:2]) == ["n", "", "\ufffd"]


def test_a_template_of_its_own() -> None:
    assert ChatTemplate("{{ messages[0].content[-1].text }}", {}).render(TURNS) == "Was ist das?"


@pytest.mark.parametrize("bos", ["tokenizer", "template", "both", "none"])
def test_prompt_ids_are_those_of_llava_s_processor(bos: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference processor is not installed here")
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tokenizer = tiny.tokenizer()
    if bos in ("tokenizer", "both"):
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}" + LLAVA if bos in ("template", "both") else LLAVA
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    size = {"height": tiny.SIDE, "width": tiny.SIDE}
    reference = transformers.LlavaProcessor(
        image_processor=clip.CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=size),
        tokenizer=fast,
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    picture = {"type": "image", "image": tiny.picture()}
    turns = [{**TURNS[0], "content": [picture, *TURNS[0]["content"][1:]]}, *TURNS[1:]]
    wanted = reference.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    wanted = np.asarray(wanted).ravel().tolist()
    ours = processor(template, tokenizer).prompt_ids(TURNS)
    place = ours.index(3)
    assert wanted.count(3) == tiny.TOKENS
    assert ours == wanted[: place + 1] + wanted[place + tiny.TOKENS :]
