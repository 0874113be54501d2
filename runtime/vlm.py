"""A bundle, ready to answer: ``load`` it, then ``ask``, ``see`` or ``chat``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from svdprune.runtime.answer import Answer, AnswerStream, Sight
from svdprune.runtime.arrays import passed
from svdprune.runtime.bundle import Bundle, open_bundle
from svdprune.runtime.decoder import Decoder, open_decoder
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import Manifest, Positions
from svdprune.runtime.options import Options
from svdprune.runtime.positions import policy_named
from svdprune.runtime.preprocess import ImageSettings, normalise, open_image, preprocess
from svdprune.runtime.prompt import CachedPrompt, Pictured
from svdprune.runtime.text import TextProcessor, user_message
from svdprune.runtime.tiling.see import read_marks, see_tiles
from svdprune.runtime.vision import VisionBackend, open_vision

if TYPE_CHECKING:
    from svdprune.runtime.chat import Chat
    from svdprune.runtime.preprocess import ImageSource


def load(
    path: str | Path,
    vision: str = "onnxruntime",
    decoder: str = "onnxruntime",
    threads: int | None = None,
    positions: str | None = None,
    verify: bool = True,
    checkpoint: str | None = None,
) -> Vlm:
    """Open a bundle and its backends.

    Args:
        path: the bundle's folder.
        vision, decoder: backends by name; ``svdprune.runtime.vision.BACKENDS.names()`` lists them. Two engines share
            the GPU, and the features of a picture never leave it.
        threads: CPU threads; None leaves the choice to the backends.
        positions: ``compact`` or ``original`` in place of the bundle's own policy.
        verify: compare the SHA-256 of every file first, engines included.
        checkpoint: for the decoder ``transformers``, the original weights.

    Raises:
        BundleError: the bundle is incomplete, changed, newer, or its parts do not fit together.
        UserError: an unknown or unavailable backend, no engine built for one, an unknown policy.
    """
    policy = None if positions is None else policy_named(positions)
    bundle = open_bundle(path, verify)
    with ExitStack() as undo:
        see = open_vision(vision, bundle, threads, verify=verify)
        undo.callback(see.close)
        answer = open_decoder(decoder, bundle, threads, checkpoint, see.device, verify)
        undo.callback(answer.close)
        vlm = Vlm(bundle, see, answer, policy or bundle.manifest.positions)
        undo.pop_all()
    return vlm


class Vlm:
    """A vision-language model with its backends open. Not for several threads at once.

    A context manager: ``close`` gives back what the backends hold, the GPU's memory above all.

    Attributes:
        bundle, manifest: what was opened.
        vision, decoder: the backends.
        text: tokenizer and chat template.
        settings: of preprocessing.
        positions: the policy in use.
    """

    def __init__(self, bundle: Bundle, vision: VisionBackend, decoder: Decoder, positions: Positions) -> None:
        manifest = bundle.manifest
        self.bundle, self.vision, self.decoder, self.positions = bundle, vision, decoder, positions
        self.manifest: Manifest = manifest
        self.text = TextProcessor.from_bundle(bundle)
        name = manifest.processor.image
        self.settings = ImageSettings.from_json(bundle.read_json(name), name)
        _check_size(self.settings, manifest)
        self.marks = read_marks(bundle)
        info = manifest.decoder
        self.embed = Embedding(bundle.file(info.embedding), info.vocab, info.hidden)

    def see(self, image: ImageSource) -> Sight:
        """Encode a picture: preprocess, vision graph.

        Args:
            image: a path, bytes, a Pillow image, or uint8 [h, w, 3] or [h, w].

        Raises:
            UserError: the picture cannot be used (see ``open_image``).
            NumericalError: NaN or infinity in the features or scores.
        """
        if self.manifest.vision.tiles is not None:
            return see_tiles(self, image, self.manifest.vision.tiles)
        started = time.perf_counter()
        pixels = preprocess(open_image(image), self.settings)
        feed = pixels if self.manifest.vision.input == "uint8" else normalise(pixels, self.settings)
        prepared = time.perf_counter()
        stays = self.vision.device is not None and self.vision.device is self.decoder.device
        output = self.vision.encode(feed[None], on_device=True) if stays else self.vision.encode(feed[None])
        seconds = time.perf_counter() - prepared
        return Sight(
            passed(output.features_in_place[0]),
            output.kept_indices[0],
            output.scores[0],
            pixels,
            prepared - started,
            seconds,
            deepstack=None if output.deepstack is None else output.deepstack[0],
        )

    def close(self) -> None:
        """Close the backends; nothing can be asked after that."""
        self.decoder.close()
        self.vision.close()

    def __enter__(self) -> Vlm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # fmt: off
    @overload
    def ask(
        self, image: ImageSource | Sight, question: str, stream: Literal[False] = ..., max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Answer: ...

    @overload
    def ask(
        self, image: ImageSource | Sight, question: str, stream: Literal[True], max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> AnswerStream: ...
    # fmt: on

    def ask(
        self,
        image: ImageSource | Sight,
        question: str,
        stream: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Answer | AnswerStream:
        """Ask one question about one picture.

        Args:
            image: a picture as ``see`` takes it, or a ``Sight`` that ``see`` gave.
            question: plain text, without the model's control tokens.
            stream: give an ``AnswerStream`` of pieces of text; the prefill is done before it returns.
            max_new_tokens, temperature, top_p, top_k: None takes the bundle's generation defaults.
            seed: makes sampling repeatable.
            stop: strings that end the answer.

        Raises:
            UserError: the picture, the question or a setting cannot be used, or the prompt is longer than the context.
            NumericalError: NaN or infinity in features, scores or logits.
        """
        defaults = self.manifest.decoder.generation
        options = Options.of(defaults, max_new_tokens, temperature, top_p, top_k, seed, stop)
        self.text.check_question(question)  # before the picture is encoded for nothing
        answer = self.chat(image).reply(question, options)
        return answer if stream else answer.answer

    def chat(self, image: ImageSource | Sight) -> Chat:
        """A conversation about one picture, which is encoded now and once."""
        from svdprune.runtime.chat import Chat

        return Chat(self, image)

    def prompt_ids(self, question: str) -> list[int]:
        """Prompt ids of one question about one picture, with one picture token.

        Raises:
            UserError: the question is empty or holds control tokens.
        """
        return self.text.prompt_ids([user_message(self.text.check_question(question), picture=True)])

    def cached_prompt(self, sights: Sight | Sequence[Sight]) -> CachedPrompt:
        """An empty cache for prompts about a picture, or about several.

        Raises:
            UserError: a ``Sight`` is of a bundle with other sizes.
        """
        pictures = [self.pictured(sight) for sight in ([sights] if isinstance(sights, Sight) else sights)]
        manifest = self.manifest
        return CachedPrompt(
            self.decoder, self.embed, pictures, self.positions, manifest.decoder, manifest.processor.image_token_id
        )

    def pictured(self, sight: Sight) -> Pictured:
        """A picture as a prompt takes it.

        Raises:
            UserError: the ``Sight`` is of a bundle with other sizes.
        """
        info = self.manifest.vision
        features, tiles = sight.features_in_place, info.tiles
        shapes = (features.shape, sight.scores.shape)
        tokens = info.tokens if tiles is None else len(sight.scores)
        wanted = ((len(sight.places), info.hidden), (tokens,))
        if shapes != wanted or (tiles is None) != (sight.tiled is None):
            raise UserError(
                f"the Sight has features {shapes[0]} and scores {shapes[1]}, this bundle {wanted[0]} and {wanted[1]}: "
                "see the picture with the bundle that answers"
            )
        return Pictured(sight.span, features, sight.deepstack)

    def first_logits(self, sight: Sight, question: str) -> np.ndarray:
        """Logits float32 [V] from which the first token of the answer is chosen."""
        return self.cached_prompt(sight).advance(self.prompt_ids(question))


def _check_size(settings: ImageSettings, manifest: Manifest) -> None:
    """Refuse image settings that make another size than the vision graph takes (where they fix one)."""
    if (settings.tiling is None) != (manifest.vision.tiles is None):
        raise BundleError(f"{manifest.processor.image} and manifest.json disagree on tiles: export the bundle again")
    made = settings.crop or settings.resize
    wanted = {"height": manifest.vision.height, "width": manifest.vision.width}
    if made is not None and set(made) == set(wanted) and made != wanted:
        raise BundleError(
            f"{manifest.processor.image} makes pictures of {made['height']} x {made['width']}, the vision graph takes "
            f"{wanted['height']} x {wanted['width']}: export the bundle again"
        )
