"""Many questions in a row: pictures encoded some at a time, and ahead of the answers.

While answers are decoded, a thread of its own already encodes the pictures of the next: backends on the host let go of
Python's lock, and decoding, which waits for memory, leaves the processor room. Each answer is the one that ``Vlm.ask``
gives.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from svdprune.runtime.answer import Answer, Sight
from svdprune.runtime.arrays import passed
from svdprune.runtime.errors import SvdpruneError, UserError
from svdprune.runtime.options import Options
from svdprune.runtime.preprocess import normalise, open_image, preprocess

if TYPE_CHECKING:
    from typing import TypeAlias

    from svdprune.runtime.preprocess import ImageSource
    from svdprune.runtime.vlm import Pictures, Vlm

    Request: TypeAlias = tuple[Pictures, str]


@dataclass
class _Group:
    """Requests that are encoded together: the sights of those before the first that failed, and why it failed."""

    requests: list[Request]
    sights: list[list[Sight]] = field(default_factory=list)
    error: SvdpruneError | None = None


_Groups = Generator[_Group, None, None]


def answer_many(
    vlm: Vlm, requests: Iterable[Request], options: Options, batch: int, overlap: bool
) -> Iterator[Answer]:
    """See ``Vlm.ask_many``."""
    if batch < 1:
        raise UserError(f"batch is {batch}, it must be 1 or more requests")
    if overlap and not (vlm.vision.device is None and vlm.decoder.device is None):
        raise UserError("engines run one after the other on their GPU: leave out overlap")
    groups = _groups(requests, batch)
    return _answers(vlm, _encoded_ahead(vlm, groups) if overlap else (_encode(vlm, group) for group in groups), options)


def _answers(vlm: Vlm, groups: _Groups, options: Options) -> Iterator[Answer]:
    """The answers in order; the first request that failed raises its error when its turn comes."""
    try:
        for group in groups:
            for (_, question), sights in zip(group.requests, group.sights, strict=False):
                yield vlm.chat(sights).reply(question, options).answer
            if group.error is not None:
                raise group.error
    finally:
        groups.close()  # its thread ends with it


def _groups(requests: Iterable[Request], batch: int) -> Iterator[_Group]:
    given = iter(requests)
    while group := list(itertools.islice(given, batch)):
        yield _Group(group)


def _encoded_ahead(vlm: Vlm, groups: Iterator[_Group]) -> _Groups:
    """The groups in order, each encoded while the caller works on the one before it."""
    with ThreadPoolExecutor(1, thread_name_prefix="svdprune-vision") as pool:
        flying: deque[Future[_Group]] = deque()
        try:
            for group in groups:
                flying.append(pool.submit(_encode, vlm, group))
                if len(flying) > 1:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


def _encode(vlm: Vlm, group: _Group) -> _Group:
    """Encode the pictures of a group: in one run where each request has one whole picture, else one by one."""
    try:
        for _, question in group.requests:
            vlm.text.check_question(question)
        alone = vlm.manifest.vision.tiles is None and len(group.requests) > 1
        single = [images for images, _ in group.requests if _is_one_picture(images)]
        if alone and len(single) == len(group.requests):
            group.sights = [[sight] for sight in _see_together(vlm, single)]
            return group
    except SvdpruneError:
        group.sights.clear()  # one of them cannot be used: one by one it shows which
    try:
        for images, question in group.requests:
            vlm.text.check_question(question)
            group.sights.append(vlm.see_all(images))
    except SvdpruneError as error:
        group.error = error
    return group


def _is_one_picture(images: Pictures) -> TypeGuard[ImageSource]:
    return not isinstance(images, (list, tuple, Sight))


def _see_together(vlm: Vlm, images: Sequence[ImageSource]) -> list[Sight]:
    """``Vlm.see`` of several pictures in one run of the vision graph; each has an even share of its seconds."""
    pixels, prepared = [], []
    for image in images:
        started = time.perf_counter()
        pixels.append(preprocess(open_image(image), vlm.settings))
        prepared.append(time.perf_counter() - started)
    started = time.perf_counter()
    stacked = np.stack(pixels)
    feed = stacked if vlm.manifest.vision.input == "uint8" else np.stack([normalise(p, vlm.settings) for p in pixels])
    stays = vlm.vision.device is not None and vlm.vision.device is vlm.decoder.device
    output = vlm.vision.encode(feed, on_device=True) if stays else vlm.vision.encode(feed)
    each = (time.perf_counter() - started) / len(pixels)
    return [
        Sight(
            passed(output.features_in_place[i]),
            output.kept_indices[i],
            output.scores[i],
            pixels[i],
            prepared[i],
            each,
            deepstack=None if output.deepstack is None else output.deepstack[i],
        )
        for i in range(len(pixels))
    ]
