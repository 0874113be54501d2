"""The front door on the tiny bundle, against the NumPy reference of its graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from svdprune.runtime import AnswerStream, BundleError, NumericalError, UserError, Vlm, load
from svdprune.runtime.manifest import Positions
from svdprune.runtime.positions import one_picture

Opener = Callable[..., Vlm]


def greedy(vlm: Vlm, ids: list[int], features: np.ndarray, kept: np.ndarray, count: int) -> list[int]:
    """Greedy tokens by the reference: the whole sequence anew for each token."""
    chosen: list[int] = []
    layout = one_picture(ids.index(3), kept, tiny.TOKENS, vlm.positions)
    for _ in range(count):
        row = [*ids, *chosen]
        embeds = tiny.weights()["embed"][row]
        embeds = np.concatenate([embeds[: layout.place], features, embeds[layout.place + 1 :]])
        chosen.append(int(np.argmax(tiny.reference_logits(embeds, layout.span(0, len(row))))))
    return chosen


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("cache", ["bundle", "shared_bundle"])
def test_greedy_tokens_are_the_reference_s(cache: str, policy: Positions, request: pytest.FixtureRequest) -> None:
    vlm = load(request.getfixturevalue(cache), threads=1, positions=policy)
    sight = vlm.see(tiny.picture())
    answer = vlm.ask(sight, "What is this?", max_new_tokens=12)
    wanted = greedy(vlm, vlm.prompt_ids("What is this?"), sight.features, sight.kept_indices, 12)
    assert answer.token_ids == wanted[: len(answer.token_ids)]
    assert len(answer.token_ids) == 12 or answer.token_ids[-1] == 2


def test_policies_differ(open_tiny: Opener) -> None:
    compact, original = open_tiny(positions="compact"), open_tiny(positions="original")
    sight = compact.see(tiny.picture())
    one, other = (vlm.first_logits(sight, "Where?") for vlm in (compact, original))
    assert np.abs(one - other).max() > 1e-3


def test_see_is_the_reference_s_choice(open_tiny: Opener) -> None:
    vlm = open_tiny()
    sight = vlm.see(tiny.picture())
    features, kept, scores = tiny.reference_vision(sight.pixels)
    assert sight.kept_indices.tolist() == kept.tolist()
    np.testing.assert_allclose(sight.features, features, atol=1e-5)
    np.testing.assert_allclose(sight.scores, scores, atol=1e-5)
    assert sight.pixels.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert sight.pixels.dtype == np.uint8


def test_a_graph_of_float_pixels_is_fed_normalised_ones(tmp_path: Path) -> None:
    vlm = load(tiny.make_bundle(tmp_path / "float", vision={"input": "float32"}), threads=1)
    sight = vlm.see(tiny.picture())
    normalised = (sight.pixels / 255 - tiny.IMAGE["mean"]) / tiny.IMAGE["std"]
    means = normalised.reshape(tiny.ROWS, tiny.PATCH, tiny.ROWS, tiny.PATCH, 3).mean(axis=(1, 3)).sum(axis=-1)
    np.testing.assert_allclose(sight.scores, means.ravel(), atol=1e-4)


def test_a_sight_of_another_bundle(open_tiny: Opener) -> None:
    vlm = open_tiny()
    sight = vlm.see(tiny.picture())
    for change in ({"features": sight.features[:, :8]}, {"features": sight.features[:3]}, {"scores": sight.scores[:9]}):
        with pytest.raises(UserError, match="see the picture with the bundle that answers"):
            vlm.ask(dataclasses.replace(sight, **change), "What?")


def test_answer_carries_counts_and_times(open_tiny: Opener) -> None:
    vlm = open_tiny()
    answer = vlm.ask(tiny.picture(), "What?", max_new_tokens=5)
    assert (answer.tokens.vision_total, answer.tokens.vision_kept) == (tiny.TOKENS, tiny.KEEP)
    assert answer.tokens.prompt == len(vlm.prompt_ids("What?")) - 1 + tiny.KEEP
    assert answer.tokens.generated == len(answer.token_ids)
    assert len(answer.times.decode) == len(answer.token_ids) - 1
    assert min(answer.times.preprocess, answer.times.vision, answer.times.prefill) > 0
    assert answer.times.first_token == answer.times.preprocess + answer.times.vision + answer.times.prefill
    assert answer.stopped in ("eos", "length")


def test_stream_joins_to_the_answer(open_tiny: Opener) -> None:
    vlm = open_tiny()
    for seed in range(5):
        stream = vlm.ask(tiny.picture(), "What?", stream=True, max_new_tokens=40, temperature=1.5, seed=seed)
        assert isinstance(stream, AnswerStream)
        pieces = list(stream)
        assert "".join(pieces) == stream.answer.text == vlm.text.decode(stream.answer.token_ids)
        whole = vlm.ask(tiny.picture(), "What?", max_new_tokens=40, temperature=1.5, seed=seed)
        assert whole.token_ids == stream.answer.token_ids


def test_seed_repeats_and_differs(open_tiny: Opener) -> None:
    vlm = open_tiny()
    sight = vlm.see(tiny.picture())
    runs = [vlm.ask(sight, "What?", max_new_tokens=20, temperature=2.0, seed=s).token_ids for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_string_ends_and_is_left_out(open_tiny: Opener) -> None:
    vlm = open_tiny()
    sight = vlm.see(tiny.picture())
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 4}
    free = vlm.ask(sight, "What?", **settings)
    stop = free.text[10:12]
    answer = vlm.ask(sight, "What?", stop=stop, **settings)
    assert answer.stopped == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
    assert len(answer.token_ids) < len(free.token_ids)


def test_eos_ends_and_is_left_out_of_the_text(tmp_path: Path, open_tiny: Opener) -> None:
    first = open_tiny().ask(tiny.picture(), "What?", max_new_tokens=3).token_ids
    vlm = load(tiny.make_bundle(tmp_path / "eos", decoder={"eos": [first[2]]}), threads=1)
    answer = vlm.ask(tiny.picture(), "What?")
    assert answer.token_ids == first[: first.index(first[2]) + 1]
    assert answer.stopped == "eos"


def test_context_bounds_the_answer(open_tiny: Opener, tmp_path: Path) -> None:
    question = "What?"
    rows = len(open_tiny().prompt_ids(question)) - 1 + tiny.KEEP
    vlm = load(tiny.make_bundle(tmp_path / "short", decoder={"context": rows + 2, "eos": []}), threads=1)
    answer = vlm.ask(tiny.picture(), question, max_new_tokens=50)
    assert (len(answer.token_ids), answer.stopped) == (3, "length")  # two rows more, and the last token needs none
    vlm = load(tiny.make_bundle(tmp_path / "full", decoder={"context": rows, "eos": []}), threads=1)
    assert len(vlm.ask(tiny.picture(), question, max_new_tokens=50).token_ids) == 1


def test_prompt_longer_than_the_context(open_tiny: Opener) -> None:
    with pytest.raises(UserError, match=r"prompt has 5\d\d tokens, the model's context is 400: ask a shorter"):
        open_tiny().ask(tiny.picture(), "x" * 500)
    with pytest.raises(UserError, match=r"prompt has 4\d\d positions, .* use compact positions"):
        open_tiny(positions="original").ask(tiny.picture(), "x" * 380)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ""}, "stop string is empty"),
    ],
)
def test_settings_out_of_range(open_tiny: Opener, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_tiny().ask(tiny.picture(), "What?", **settings)


@pytest.mark.parametrize("part", ["scores", "features"])
def test_nan_is_an_error_not_a_choice(part: str, tmp_path: Path) -> None:
    vlm = load(tiny.make_bundle(tmp_path / "nan", poison=part), threads=1)
    vlm.see(tiny.picture())
    with pytest.raises(NumericalError, match=f"{part} as NaN or infinity"):
        vlm.see(np.zeros((30, 30, 3), np.uint8))


def test_nan_in_the_logits(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="decoder gave NaN"):
        load(tiny.make_bundle(tmp_path / "nan", nan=True), threads=1).ask(tiny.picture(), "What?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vision": "onnxruntim"}, r"no vision backend is called 'onnxruntim' \(did you mean onnxruntime\?\)"),
        ({"decoder": "llama.cpp"}, "choose one of onnxruntime, transformers"),
        ({"decoder": "transformers"}, "give checkpoint="),
        ({"checkpoint": "folder"}, "leave out checkpoint="),
        ({"positions": "absolute"}, "choose one of compact, original"),
    ],
)
def test_unknown_names_list_the_choices(open_tiny: Opener, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_tiny(**options)


def test_threads_of_zero(bundle: Path) -> None:
    with pytest.raises(UserError, match="threads is 0"):
        load(bundle, threads=0)


def test_cuda_is_refused_where_onnxruntime_has_none(open_tiny: Opener) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UserError, match=r"has no CUDAExecutionProvider .*svdprune\[cuda\]"):
        open_tiny(vision="onnxruntime-cuda")


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="makes pictures of 28 x 28, the vision graph takes 14 x 14"):
        load(tiny.make_bundle(tmp_path / "size", vision={"height": 14, "width": 14}), threads=1)
    vlm = load(tiny.make_bundle(tmp_path / "keep", vision={"keep": 3}), threads=1)
    with pytest.raises(
        BundleError, match=r"gave features float32 \[1, 4, 32\], the manifest says float32 \[1, 3, 32\]"
    ):
        vlm.see(tiny.picture())
    with pytest.raises(BundleError, match=r"embed_tokens.npy is \[\d+, 32\], the manifest says \[9, 32\]"):
        load(tiny.make_bundle(tmp_path / "vocab", decoder={"vocab": 9}), threads=1)
    with pytest.raises(BundleError, match=r"model.onnx lacks the input past_key_values.2.key"):
        load(tiny.make_bundle(tmp_path / "layers", decoder={"layers": 3}), threads=1)
