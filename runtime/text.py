"""Text to token ids and back: the bundle's tokenizer and chat template, and a detokenizer for streams."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.template import ChatTemplate, Message

if TYPE_CHECKING:
    from svdprune.runtime.bundle import Bundle
    from svdprune.runtime.manifest import ProcessorInfo

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how byte-fallback vocabularies spell one byte


def user_message(question: str, picture: int) -> Message:
    """A user's turn, with so many pictures (True is one) before the question."""
    images = [{"type": "image"} for _ in range(picture)]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


def assistant_message(answer: str) -> Message:
    """A turn of the model."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


class TextProcessor:
    """Conversations to prompt ids, answers' ids to text.

    Args:
        tokenizer: content of ``tokenizer.json``.
        chat_template: jinja2 text.
        image_token: the token that stands for the picture in the rendered text, ``image_token_id`` its id.
        bos_token, eos_token: passed to the template; ``bos_token`` also decides whether the tokenizer adds its own.
        placeholder, picture: what the template writes for a picture, and the text that takes its place, with one
            ``image_token`` in it; None where the template writes ``image_token``.

    Raises:
        BundleError: the tokenizer or the template cannot be read, ``image_token`` has another id, or one of
            ``placeholder`` and ``picture`` does not fit the other.
    """

    def __init__(
        self,
        tokenizer: str,
        chat_template: str,
        image_token: str,
        image_token_id: int,
        bos_token: str | None = None,
        eos_token: str | None = None,
        placeholder: str | None = None,
        picture: str | None = None,
    ) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # tokenizers raises bare Exception for every fault of the file
            raise BundleError(f"the tokenizer cannot be read ({error}): export the bundle again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self._tokenizer.token_to_id(image_token) != image_token_id:
            found = self._tokenizer.token_to_id(image_token)
            raise BundleError(
                f"the tokenizer gives the image token {image_token} the id {found} and the manifest {image_token_id}: "
                "export the bundle again"
            )
        if (placeholder is None) != (picture is None) or placeholder == "":
            raise BundleError("processor.placeholder and processor.picture go together: export the bundle again")
        if picture is not None and picture.count(image_token) != 1:
            raise BundleError(
                f"processor.picture {picture!r} must hold the image token {image_token} once: export the bundle again"
            )
        self._placeholder, self._picture = placeholder, picture
        self.image_token, self.image_token_id = image_token, image_token_id
        self._bos_token = bos_token
        known = {"bos_token": bos_token, "eos_token": eos_token, "image_token": image_token}
        variables = {name: token for name, token in known.items() if token is not None}
        self._template = ChatTemplate(chat_template, variables)
        self._special = sorted(
            (token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special),
            key=len,
            reverse=True,  # the longest is named where one holds another
        )

    @staticmethod
    def from_bundle(bundle: Bundle) -> TextProcessor:
        """The text processor of an opened bundle."""
        return TextProcessor.of(bundle.manifest.processor, bundle.read_text)

    @staticmethod
    def of(names: ProcessorInfo, read: Callable[[str], str]) -> TextProcessor:
        """The text processor that a manifest's ``processor`` names; ``read`` gives the text of a file of the bundle."""
        return TextProcessor(
            read(names.tokenizer),
            read(names.chat_template),
            names.image_token,
            names.image_token_id,
            names.bos_token,
            names.eos_token,
            names.placeholder,
            names.picture,
        )

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template writes it; what stands for a picture is not replaced yet."""
        return self._template.render(messages, add_generation_prompt)

    def prompt_ids(self, messages: list[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, one image token for each picture.

        As transformers' ``processor.apply_chat_template(tokenize=True)``: the tokenizer adds its own special tokens
        unless the rendered text already begins with the BOS token.
        """
        text = self.render(messages, add_generation_prompt)
        given = self._bos_token is not None and text.startswith(self._bos_token)
        if self._placeholder is not None and self._picture is not None:
            text = text.replace(self._placeholder, self._picture)
        return list(self._tokenizer.encode(text, add_special_tokens=not given).ids)

    def check_question(self, question: object) -> str:
        """The question, when it is text that cannot pass for something else in the prompt.

        Raises:
            UserError: not a string, blank, not encodable as UTF-8, or holding the image token, another special token
                or the template's placeholder of a picture.
        """
        if not isinstance(question, str):
            raise UserError(f"the question must be text, not {type(question).__name__}")
        if not question.strip():
            raise UserError("the question is empty: ask something about the picture")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError("the question is not valid Unicode text: type it again") from error
        for token in (self.image_token, self._placeholder, *self._special):
            if token is not None and token in question:
                raise UserError(f"the question holds {token}, which is a control token of the model: leave it out")
        if self.image_token_id in self._tokenizer.encode(question, add_special_tokens=False).ids:
            raise UserError("the question holds text that the tokenizer reads as the picture's place: rephrase it")
        return question

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> StreamDecoder:
        """A fresh detokenizer for one answer."""
        return StreamDecoder(self._tokenizer)


class StreamDecoder:
    """Token ids in, pieces of whole characters out; the pieces joined are the decoded ids.

    The whole answer is decoded at each token, since a token's text depends on its neighbours (leading spaces, bytes of
    one character); a piece is held back while it could still change.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain, "" when it ends inside a character."""
        self._ids.append(token)
        if _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""):
            return ""  # a run of byte tokens decodes as one: an unfinished character spoils the finished before it
        text = self._decode()
        certain = text.startswith(self._given) and not text.endswith(_REPLACEMENT)
        return self._advance(text) if certain else ""

    def finish(self) -> str:
        """What was still held back; an unfinished character becomes U+FFFD, as in ``decode``."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _advance(self, text: str) -> str:
        piece, self._given = text[len(self._given) :], text
        return piece
