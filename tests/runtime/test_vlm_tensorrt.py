"""The whole way with engines, on fakes that compute: ONNX Runtime's answers, features left on the GPU, refusals."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_trt
import numpy as np
import pytest
import tiny
import tiny_engines
from click.testing import CliRunner
from fake_cuda import Error, FakeCuda

from svdprune.runtime import NumericalError, UserError, Vlm, load, open_bundle
from svdprune.runtime.arrays import DeviceArray
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import SvdpruneError

QUESTIONS = ["What is this?", "Which colour?", "And the one beside it?"]
Built = Callable[..., tuple[Path, FakeCuda, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engines.engine_bundle(tmp_path_factory.mktemp("chain") / "bundle", decoder={"eos": []}, cache=200)


@pytest.fixture
def built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """A machine with both engines of the bundle: its path, CUDA, TensorRT's module."""

    def make(api: str = "tensorrt-10.3", sm: int = 87) -> tuple[Path, FakeCuda, Any]:
        cuda, trt = tiny_engines.machine(monkeypatch, api, sm)
        for part in ("vision", "decoder"):
            tiny_engines.build(folder, part, trt.__name__, sm, rows=200)
        return folder, cuda, trt

    return make


def talk(vlm: Vlm, length: int = 8) -> list[list[int]]:
    chat = vlm.chat(tiny.picture())
    return [chat.ask(question, max_new_tokens=length).token_ids for question in QUESTIONS]


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("api", tiny_engines.APIS)
def test_answers_are_onnx_runtime_s(api: str, policy: str, built: Built) -> None:
    path, cuda, trt = built(api)
    name = trt.__name__
    reference = load(path, threads=1, positions=policy)
    wanted = talk(reference)
    logits = reference.first_logits(reference.see(tiny.picture()), QUESTIONS[0])
    for vision, decoder in ((name, name), (name, "onnxruntime"), ("onnxruntime", name)):
        with load(path, vision, decoder, threads=1, positions=policy) as vlm:
            assert talk(vlm) == wanted
            ours = vlm.first_logits(vlm.see(tiny.picture()), QUESTIONS[0])
            np.testing.assert_allclose(ours, logits, atol=2e-4)
        assert (cuda.held, len(cuda.pinned), cuda._streams) == (0, 0, set())


def test_features_never_leave_the_gpu(built: Built) -> None:
    path, cuda, _ = built()
    with load(path, "tensorrt", "tensorrt") as vlm:
        assert vlm.vision.device is vlm.decoder.device
        sight = vlm.see(tiny.picture())
        features = tiny.KEEP * tiny.HIDDEN * 4
        assert isinstance(sight.features_in_place, DeviceArray)
        assert cuda.copies["DeviceToHost"] == tiny.KEEP * 8 + tiny.TOKENS * 4
        cuda.copies.clear()
        answer = vlm.ask(sight, "What?", max_new_tokens=6)
        steps = len(answer.token_ids)  # the prompt's logits, and those of each token but the last
        assert cuda.copies["DeviceToHost"] == steps * tiny.VOCAB * 4
        assert cuda.copies["DeviceToDevice"] == features
        text = answer.tokens.prompt - tiny.KEEP
        rows = answer.tokens.prompt + steps - 1
        assert cuda.copies["HostToDevice"] == (text + steps - 1) * tiny.HIDDEN * 4 + rows * 8 + steps * 8
        wanted, _, _ = tiny.reference_vision(sight.pixels)
        np.testing.assert_allclose(sight.features, wanted, atol=1e-5)  # read: now they are fetched
        assert cuda.copies["DeviceToHost"] == steps * tiny.VOCAB * 4 + features


def test_an_earlier_picture_can_be_asked_about_later(built: Built) -> None:
    path, cuda, _ = built()
    reference = load(path, threads=1)
    with load(path, "tensorrt", "tensorrt") as vlm:
        sights = [vlm.see(tiny.picture(seed)) for seed in range(3)]
        for seed in (0, 2, 1):
            wanted = reference.ask(tiny.picture(seed), "What?", max_new_tokens=6)
            assert vlm.ask(sights[seed], "What?", max_new_tokens=6).token_ids == wanted.token_ids
        assert cuda.copies["DeviceToHost"] < 3 * 1000 + 18 * tiny.VOCAB * 4
    for sight, words in ((sights[0], "the GPU was closed"), (sights[2], "what this array belongs to was closed")):
        with pytest.raises(UserError, match=words):
            _ = sight.features
    with pytest.raises(UserError, match="closed"):
        vlm.see(tiny.picture())


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_several_pictures_go_to_the_decoder_in_place(built: Built, policy: str) -> None:
    path, cuda, _ = built()
    reference = load(path, threads=1, positions=policy)
    pictures = [tiny.picture(seed) for seed in range(3)]
    wanted = reference.ask(pictures, "What?", max_new_tokens=6)
    with load(path, "tensorrt", "tensorrt", positions=policy) as vlm:
        sights = vlm.see_all(pictures)
        cuda.copies.clear()
        assert vlm.ask(sights, "What?", max_new_tokens=6).token_ids == wanted.token_ids
        assert cuda.copies["DeviceToDevice"] == 3 * tiny.KEEP * tiny.HIDDEN * 4


def test_one_answer_after_another_allocates_nothing(built: Built) -> None:
    path, cuda, _ = built()
    with load(path, "tensorrt", "tensorrt") as vlm:
        for seed in range(2):
            vlm.ask(tiny.picture(seed), "What is this?", max_new_tokens=4)
        allocated = cuda.calls["cudaMalloc"], cuda.calls["cudaMallocHost"]
        for seed in range(3):
            vlm.ask(tiny.picture(seed), "And this?", max_new_tokens=9)
        assert (cuda.calls["cudaMalloc"], cuda.calls["cudaMallocHost"]) == allocated
        assert cuda.calls["cudaGraphInstantiate"] == 2  # one of the vision engine, one of a step


def test_an_unread_stream_gives_its_cache_back(built: Built) -> None:
    path, cuda, _ = built()
    with load(path, "tensorrt", "tensorrt") as vlm:
        vlm.ask(tiny.picture(), "What?", max_new_tokens=4)
        gc.collect()
        held = cuda.held
        for _ in range(3):
            next(vlm.ask(tiny.picture(), "What?", stream=True, max_new_tokens=30))
        gc.collect()
        assert cuda.held <= 2 * held  # at most one more, whatever the order of collection
        assert talk(vlm) == talk(load(path, threads=1))


def test_the_cache_bounds_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engines.machine(monkeypatch)
    question = "What?"
    plain = load(tiny.make_bundle(tmp_path / "plain"), threads=1)
    rows = len(plain.prompt_ids(question)) - 1 + tiny.KEEP
    path = tiny_engines.engine_bundle(tmp_path / "bundle", cache=rows + 2, decoder={"eos": []})
    for part in ("vision", "decoder"):
        tiny_engines.build(path, part, rows=rows + 2)
    with load(path, "tensorrt", "tensorrt") as vlm:
        answer = vlm.ask(tiny.picture(), question, max_new_tokens=50)
        assert (len(answer.token_ids), answer.stopped) == (3, "length")  # two rows more, and the last token needs none
        with pytest.raises(
            UserError, match=rf"prompt has {rows + 3} tokens, the decoder engine's cache {rows + 2} rows"
        ):
            vlm.ask(tiny.picture(), question + "???")


def test_nan_in_features_that_stay_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engines.machine(monkeypatch)
    path = tiny_engines.engine_bundle(tmp_path / "bundle", poison="features")
    for part in ("vision", "decoder"):
        tiny_engines.build(path, part)
    with load(path, "tensorrt", "tensorrt") as vlm:
        sight = vlm.see(np.zeros((30, 30, 3), np.uint8))
        with pytest.raises(NumericalError, match=r"vision encoder gave 128 of 128 features as NaN"):
            vlm.ask(sight, "What?")
        assert vlm.ask(tiny.picture(), "What?", max_new_tokens=3).token_ids
    with (
        load(path, "tensorrt", "onnxruntime", threads=1) as vlm,
        pytest.raises(NumericalError, match="features as NaN"),
    ):
        vlm.see(np.zeros((30, 30, 3), np.uint8))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_no_engine_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = tiny_engines.machine(monkeypatch)
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    with pytest.raises(UserError, match=r"has no vision engine for TensorRT: run `svdprune build"):
        load(path, "tensorrt", "onnxruntime", threads=1)
    tiny_engines.build(path, "vision")
    with pytest.raises(UserError, match=r"has no decoder engine for TensorRT: run `svdprune build"):
        load(path, "tensorrt", "tensorrt")
    assert (cuda.held, cuda._streams) == (0, set())  # the vision engine was closed again


def test_no_gpu(built: Built) -> None:
    path, cuda, trt = built()
    cuda.broken, trt.fake.sm = Error.cudaErrorInsufficientDriver, None
    for backends in (("tensorrt", "onnxruntime"), ("onnxruntime", "tensorrt"), ("tensorrt", "tensorrt")):
        with pytest.raises(UserError, match="CUDA error 35"):
            load(path, *backends, threads=1)


def test_tensorrt_is_missing(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = built()
    fake_trt.uninstall(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(UserError, match="TensorRT for Python is not installed"):
        load(path, "tensorrt", threads=1)
    with pytest.raises(UserError, match=r"TensorRT-RTX needs the package .*svdprune\[rtx\]"):
        load(path, decoder="tensorrt_rtx", threads=1)


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_an_engine_that_is_truncated(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = tiny_engines.machine(monkeypatch)
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    files = {name: tiny_engines.build(path, name) for name in ("vision", "decoder")}
    data = files[part].path.read_bytes()
    files[part].path.write_bytes(data[:-100])
    with pytest.raises(UserError, match=rf"{part}.engine is truncated"):
        load(path, "tensorrt", "tensorrt")
    files[part].path.write_bytes(data[:-100] + bytes(100))  # of the right size
    with pytest.raises(UserError, match=rf"{part}.engine was changed since it was built"):
        load(path, "tensorrt", "tensorrt")
    with pytest.raises(UserError, match=r"the engine is truncated or was changed: run `svdprune build` again"):
        load(path, "tensorrt", "tensorrt", verify=False)
    assert (cuda.held, cuda._streams) == (0, set())


def test_an_engine_of_another_gpu_tensorrt_or_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    tiny_engines.machine(monkeypatch, "tensorrt-10.3", sm=89)
    tiny_engines.build(path, "vision", sm=89)
    tiny_engines.machine(monkeypatch, "tensorrt-10.3", sm=87)
    with pytest.raises(UserError, match=r"stale, it is of a GPU of sm 89 \(this is sm 87\): run `svdprune build"):
        load(path, "tensorrt", threads=1)
    tiny_engines.machine(monkeypatch, "tensorrt-11.4", sm=89)
    with pytest.raises(UserError, match=r"stale, it is of TensorRT 10.3.0 \(this is 11.4.0.8\)"):
        load(path, "tensorrt", threads=1)
    tiny_engines.machine(monkeypatch, "tensorrt-10.3", sm=89)
    other = tiny.make_bundle(tmp_path / "other", poison="scores")
    (path / "engines").rename(other / "engines")
    with pytest.raises(UserError, match=r"stale, it is of another graph than this bundle's"):
        load(other, "tensorrt", threads=1)


def test_a_note_that_hides_what_the_engine_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself refuses what ``build.json`` did not tell."""
    path = tiny_engines.engine_bundle(tmp_path / "bundle")
    _, trt = tiny_engines.machine(monkeypatch, "tensorrt-10.3", sm=89)
    tiny_engines.build(path, "vision", sm=87)  # noted as of another GPU than the one that built it
    cuda, trt = tiny_engines.machine(monkeypatch, "tensorrt-10.3", sm=87)
    with pytest.raises(UserError, match=r"built for another GPU \(compute capability 8.9, this one is 8.7\)"):
        load(path, "tensorrt", threads=1)
    assert trt.fake.sm == 87 and cuda._streams == set()


def test_a_bundle_whose_target_has_no_decoder_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engines.machine(monkeypatch)
    path = tiny.make_bundle(tmp_path / "bundle", decoder={"engine_refused": "TensorRT 10.3 has no Attention layer"})
    tiny_engines.build(path, "vision")
    with pytest.raises(UserError, match=r"no decoder graph for engines \(TensorRT 10.3 has no Attention layer\)"):
        load(path, "tensorrt", "tensorrt")
    with load(path, "tensorrt", "onnxruntime", threads=1) as vlm:
        assert talk(vlm) == talk(load(path, threads=1))


# ---- the command line ------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(group, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("decoder", ["onnxruntime", "tensorrt"])
def test_svdprune_run(decoder: str, built: Built, tmp_path: Path) -> None:
    path, cuda, _ = built()
    picture = tmp_path / "scene.png"
    tiny.picture().save(picture)
    asked = ("run", path, "--image", picture, "--prompt", "What?", "--max-new-tokens", 5, "--threads", 1)
    result = run(*asked, "--vision-backend", "tensorrt", "--decoder-backend", decoder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == json.loads(run(*asked, "--json").stdout)["token_ids"]
    assert cuda.held == 0


def test_svdprune_run_without_what_it_needs(built: Built, tmp_path: Path) -> None:
    path, cuda, trt = built()
    asked = ("run", path, "--image", "x.png", "--prompt", "What?", "--vision-backend")
    for backend, words in (("tensorrt_rtx", "svdprune"), ("tensorrtx", "did you mean tensorrt")):
        result = run(*asked, backend)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert words in result.stderr
    cuda.broken, trt.fake.sm = Error.cudaErrorNoDevice, None
    result = run(*asked, "tensorrt")
    assert result.exit_code == 2
    assert result.stderr.startswith("svdprune: CUDA finds no GPU (CUDA error 100)")


def test_a_fault_of_the_gpu_is_ours_not_the_caller_s(built: Built) -> None:
    path, cuda, _ = built()
    with load(path, "tensorrt", "onnxruntime", threads=1) as vlm:
        cuda.fail_next = Error.cudaErrorIllegalAddress
        with pytest.raises(SvdpruneError, match="CUDA error 700") as caught:
            vlm.see(tiny.picture())
        assert caught.value.exit_code == 1
    assert open_bundle(path).manifest.decoder.engine is not None
