"""A bundle, ready to answer: ``load`` it, then ``ask``, ``see`` or ``chat``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, cast, overload

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
from svdprune.runtime.tiling import SEVERAL
from svdprune.runtime.tiling.see import read_marks, see_frames, see_tiles
from svdprune.runtime.vision import VisionBackend, open_vision

if TYPE_CHECKING:
    from typing import TypeAlias

    from svdprune.runtime.chat import Chat
    from svdprune.runtime.preprocess import ImageSource

    Pictures: TypeAlias = ImageSource | Sight | Sequence[ImageSource | Sight]


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
        self.embed = Embedding(bundle.file(info.embedding), info.vocab, info.hidden, info.embed_scale)

    def see(self, image: ImageSource) -> Sight:
        """Encode one picture, the only one of its prompt: preprocess, vision graph.

        Args:
            image: a path, bytes, a Pillow image, or uint8 [h, w, 3] or [h, w].

        Raises:
            UserError: the picture cannot be used (see ``open_image``).
            NumericalError: NaN or infinity in the features or scores.
        """
        return self.see_all([image])[0]

    def see_all(self, images: Pictures, beside: int = 0) -> list[Sight]:
        """Encode the pictures of one prompt; some models, and the budget ``prompt``, take them otherwise than alone.

        Args:
            images: one or several, as ``see`` takes them; what is a ``Sight`` already stays as it is.
            beside: how many more pictures the prompt holds.

        Raises:
            UserError, NumericalError: as of ``see``; no picture; more than the bundle was exported for.
        """
        given = listed(images)
        if not given:
            raise UserError("there is no picture: give one or more")
        fresh = [image for image in given if not isinstance(image, Sight)]
        if self.manifest.vision.tiles is not None and fresh:
            made = iter(see_tiles(self, fresh, self.manifest.vision.tiles, len(given) + beside))
        else:
            made = iter([self._see_whole(image) for image in fresh])
        return [image if isinstance(image, Sight) else next(made) for image in given]

    def see_later(self, images: Pictures, before: int) -> list[Sight]:
        """``see_all`` for pictures of a later turn, after ``before`` others.

        Raises:
            UserError: as of ``see_all``; a model that takes a picture otherwise when it is alone, as the first was.
        """
        tiling = self.settings.tiling
        if before == 1 and tiling is not None and tiling.get(SEVERAL) is not None:
            raise UserError(
                "this model takes a picture that is alone in finer detail than one of several: give all pictures with "
                "the first question"
            )
        return self.see_all(images, before)

    def see_video(self, frames: Sequence[ImageSource]) -> list[Sight]:
        """Encode the frames of a video: as the model's own kind of video where it has one that pictures are chosen for
        (one ``Sight`` of all frames), otherwise as so many pictures.

        Raises:
            UserError: as of ``see_all``; more frames than the vision graph takes.
        """
        if self.manifest.vision.tiles is not None and frames:
            sight = see_frames(self, frames, self.manifest.vision.tiles)
            if sight is not None:
                return [sight]
        return self.see_all(list(frames))

    def _see_whole(self, image: ImageSource) -> Sight:
        """A picture that is not cut."""
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
        self, image: Pictures, question: str, stream: Literal[False] = ..., max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Answer: ...

    @overload
    def ask(
        self, image: Pictures, question: str, stream: Literal[True], max_new_tokens: int | None = ...,
        temperature: float | None = ..., top_p: float | None = ..., top_k: int | None = ..., seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> AnswerStream: ...
    # fmt: on

    def ask(
        self,
        image: Pictures,
        question: str,
        stream: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Answer | AnswerStream:
        """Ask one question about one picture or several.

        Args:
            image: a picture as ``see`` takes it, a ``Sight`` that ``see`` gave, or a list of these.
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

    def ask_many(
        self,
        requests: Iterable[tuple[Pictures, str]],
        batch: int = 1,
        overlap: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Answer]:
        """Ask one question after another, each about its own pictures: the answers of ``ask``, in order, sooner.

        Args:
            requests: pairs of what ``ask`` takes as image and question. Read as they are needed, from this thread.
            batch: requests whose pictures are encoded in one run of the vision graph (where each has one that is not
                cut into tiles). More than one needs memory for all; an engine must be built for it (``--batch``).
            overlap: encode the next pictures in a thread while the last answers are decoded: for long answers and
                processors that decoding leaves idle (docs/performance.md). Not with engines, since a GPU is one.
            max_new_tokens, temperature, top_p, top_k, seed, stop: as of ``ask``, for every question alike.

        Raises:
            UserError, NumericalError: as of ``ask``, when the answer of the request is due; the ones before it were
                given. ``overlap`` with an engine.
        """
        from svdprune.runtime.many import answer_many

        defaults = self.manifest.decoder.generation
        options = Options.of(defaults, max_new_tokens, temperature, top_p, top_k, seed, stop)
        return answer_many(self, requests, options, batch, overlap)

    def chat(self, image: Pictures) -> Chat:
        """A conversation about one picture or a list of them, which are encoded now and once."""
        from svdprune.runtime.chat import Chat

        return Chat(self, image)

    def prompt_ids(self, question: str, pictures: int = 1) -> list[int]:
        """Prompt ids of one question about so many pictures, with one picture token for each.

        Raises:
            UserError: the question is empty or holds control tokens.
        """
        return self.text.prompt_ids([user_message(self.text.check_question(question), pictures)])

    def cached_prompt(self, sights: Sight | Sequence[Sight], positions: Positions | None = None) -> CachedPrompt:
        """An empty cache for prompts about a picture, or about several, under another policy of ``positions`` if asked.

        Raises:
            UserError: see ``pictured``.
        """
        pictures = self.pictured([sights] if isinstance(sights, Sight) else sights)
        manifest = self.manifest
        return CachedPrompt(
            self.decoder,
            self.embed,
            pictures,
            positions or self.positions,
            manifest.decoder,
            manifest.processor.image_token_id,
        )

    def pictured(self, sights: Sequence[Sight]) -> list[Pictured]:
        """The pictures of one prompt as it takes them.

        Raises:
            UserError: a ``Sight`` is of a bundle with other sizes, or they have more tokens than one budget over all of
                them.
        """
        info = self.manifest.vision
        for sight in sights:
            shapes = (sight.features_in_place.shape, sight.scores.shape)
            tokens = info.tokens if info.tiles is None else len(sight.scores)
            wanted = ((len(sight.places), info.hidden), (tokens,))
            if shapes != wanted or (info.tiles is None) != (sight.tiled is None):
                raise UserError(
                    f"the Sight has features {shapes[0]} and scores {shapes[1]}, this bundle {wanted[0]} and "
                    f"{wanted[1]}: see the picture with the bundle that answers"
                )
        kept = sum(len(sight.kept_indices) for sight in sights)
        if info.tiles is not None and info.tiles.budget == "prompt" and kept > info.keep:
            raise UserError(
                f"the pictures keep {kept} tokens, the bundle {info.keep} of all pictures of a prompt together: "
                "give all of them at once, with the first question"
            )
        return [Pictured(sight.span, sight.features_in_place, sight.deepstack) for sight in sights]

    def first_logits(self, sights: Sight | Sequence[Sight], question: str) -> np.ndarray:
        """Logits float32 [V] from which the first token of the answer is chosen."""
        pictures = 1 if isinstance(sights, Sight) else len(sights)
        return self.cached_prompt(sights).advance(self.prompt_ids(question, pictures))


def listed(images: Pictures) -> list[ImageSource | Sight]:
    """One picture or several as a list."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast("ImageSource | Sight", images)]


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
