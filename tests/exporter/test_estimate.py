"""What an estimate says at K and at all tokens, its memory, and the ways to ask it badly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from click.testing import CliRunner

from svdprune.exporter.estimate import STAGES, Request, estimate, load_model, read_model
from svdprune.exporter.estimate.costs import WEIGHT_BITS, format_of
from svdprune.exporter.estimate.memory import RESERVE_SHARED
from svdprune.exporter.selection import SelectorConfig
from svdprune.exporter.source import ALIASES
from svdprune.runtime.cli.app import group
from svdprune.runtime.errors import UserError
from svdprune.runtime.roofline import NOT_MEASURED
from svdprune.runtime.targets import TARGETS
from tests.exporter.estimate_models import CONFIGS, PICTURES

ORIN = "jetson-orin"
SIZES = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
FLORENCE = '{"model_type": "florence", "vision_config": {}}'


def llava(**changed: Any) -> dict[str, Any]:
    return {**CONFIGS["llava"], **changed}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that holds a config.json and no weights."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(llava()))
    return place


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(group, ["estimate", *arguments], catch_exceptions=False)
    return done.exit_code, done.output


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_estimated(name: str) -> None:
    model = read_model(name, CONFIGS[name], picture=PICTURES.get(name), crops=4 if name == "smolvlm" else None)
    result = estimate(model, 1, ORIN, selector=SelectorConfig(rank=1), request=Request(8, 4))
    for case in (result.pruned, result.unpruned):
        assert [stage for stage, _ in case.stages] == list(STAGES)
        assert case.first_token > 0
    assert result.unpruned.tokens == model.tokens > result.pruned.tokens
    assert result.unpruned.stage("selection").seconds == 0 < result.pruned.stage("selection").seconds
    assert result.unpruned.stage("prefill").flops > result.pruned.stage("prefill").flops
    assert result.unpruned.stage("vision") == result.pruned.stage("vision")


def test_tokens_of_every_family() -> None:
    tokens = {name: read_model(name, config, picture=PICTURES.get(name)).tokens for name, config in CONFIGS.items()}
    assert tokens == {
        "llava": 16,
        "llava with SigLIP": 16,
        "llava with DINOv2": 16,
        "llava_next": 5 * 16,  # the picture whole and its four tiles
        "idefics3": 4,
        "smolvlm": 1,
        "internvl": 4,
        "qwen2_5_vl": 8,
        "qwen3_vl": 8,
        "paligemma": 16,
        "paligemma on Gemma 2": 16,
        "gemma3": 4,
    }


def test_the_shipped_model_is_read_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdprune.exporter.source.Checkpoint", Mock(side_effect=AssertionError))
    model = load_model("mini-llava")
    assert (model.name, model.tokens, model.tower.run) == ("mini-llava", 576, 6)
    assert estimate("mini-llava", "10%", ORIN).pruned.tokens == 58


def test_of_a_hub_model_only_its_config_files_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Mock(return_value=str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    result = estimate("llava", 4, ORIN, selector=SelectorConfig(rank=4), revision="main")
    assert result.model.name == ALIASES["llava"]
    assert set(fetch.call_args.kwargs["allow_patterns"]) == {
        "config.json", "preprocessor_config.json", "processor_config.json"
    }  # fmt: skip
    assert fetch.call_args.kwargs["revision"] == "main"


def test_what_the_config_leaves_out_has_transformers_defaults() -> None:
    model = read_model("bare", {"model_type": "llava"})
    assert (model.tower.layers, model.tower.run, model.tokens) == (24, 23, 576)
    assert (model.text.layers, model.text.hidden, model.text.intermediate) == (32, 4096, 11008)


def test_a_batch_reads_the_weights_once() -> None:
    model = read_model("tiny", llava())
    one, four = (
        estimate(model, 4, ORIN, selector=SelectorConfig(rank=4), request=Request(batch=batch)).pruned
        for batch in (1, 4)
    )
    for stage in ("vision", "projector", "prefill", "decode step"):
        assert four.stage(stage).flops == 4 * one.stage(stage).flops
        assert four.stage(stage).bytes < 4 * one.stage(stage).bytes
    assert four.memory.cache == 4 * one.memory.cache
    assert four.memory.decoder_weights == one.memory.decoder_weights


def test_memory_of_weights_and_cache() -> None:
    model = read_model("tiny", llava())
    memory = estimate(model, 4, ORIN, selector=SelectorConfig(rank=4), request=Request(8, 4, cache=100)).pruned.memory
    text = model.text
    assert memory.vision_weights == 2 * model.vision_parameters
    assert memory.decoder_weights == 2 * (text.parameters - text.table)  # the embedding table is beside it
    assert memory.embedding == 2 * text.table
    assert memory.cache == 100 * text.layers * 2 * text.kv_heads * text.head_dim * 2
    assert memory.total == memory.vision_engine + memory.decoder_engine + memory.embedding + memory.cache
    assert memory.free == 64 * 10**9 - RESERVE_SHARED
    assert memory.fits is memory.build_fits is True


def test_a_tied_head_is_stored_beside_the_table() -> None:
    tied = read_model("tied", llava(tie_word_embeddings=True))
    memory = estimate(tied, 4, ORIN, selector=SelectorConfig(rank=4)).pruned.memory
    assert memory.decoder_weights == 2 * tied.text.parameters


def test_a_model_too_large_does_not_fit() -> None:
    big = read_model("13B", {"model_type": "llava"})
    result = estimate(big, 32, "jetson-orin-nano")
    assert result.pruned.memory.fits is False
    assert result.to_dict()["pruned"]["memory"]["fits"] is False
    assert estimate(big, 32, "jetson-orin").pruned.memory.fits is True


def test_int4_weights_are_a_quarter_and_their_arithmetic_is_half_precision() -> None:
    big = read_model("7B", {"model_type": "llava"})
    half, four = (estimate(big, 32, ORIN, decoder_precision=precision).pruned for precision in ("fp16", "int4"))
    assert WEIGHT_BITS["int4"] == format_of("int4").bits == 4 + 36 / 32  # what `exporter.decoder.quantise` writes
    assert 0.3 < four.memory.decoder_weights / half.memory.decoder_weights < 0.35
    assert four.stage("decode step").seconds < 0.4 * half.stage("decode step").seconds
    full, four_full = (estimate(big, 576, ORIN, decoder_precision=p).pruned for p in ("fp16", "int4"))
    assert four_full.stage("prefill").seconds == pytest.approx(full.stage("prefill").seconds, rel=0.1)


def test_memory_bound_stages_follow_the_bandwidth() -> None:
    big = read_model("7B", {"model_type": "llava"})
    slow, fast = (estimate(big, 32, ORIN, bandwidth=gbs).pruned.stage("decode step") for gbs in (100, 200))
    assert slow.bound == fast.bound == "memory"
    assert slow.seconds == pytest.approx(2 * fast.seconds, rel=0.02)


def test_crops_multiply_the_tower_alone() -> None:
    one, three = (read_model("next", CONFIGS["llava_next"], crops=crops) for crops in (1, 3))
    cases = [estimate(model, 4, ORIN, selector=SelectorConfig(rank=4)).pruned for model in (one, three)]
    assert cases[1].stage("vision").flops == 3 * cases[0].stage("vision").flops
    assert cases[1].stage("prefill") == cases[0].stage("prefill")
    assert not one.notes
    assert "crops of the picture assumed: 5" in read_model("next", CONFIGS["llava_next"]).notes[0]


@pytest.mark.parametrize(
    ("name", "preprocessor", "crops"),
    [
        ("smolvlm", None, 1),
        ("smolvlm", {"do_image_splitting": False}, 1),
        ("smolvlm", {"do_image_splitting": True, **SIZES}, 17),
        ("internvl", {"crop_to_patches": True, "max_patches": 12}, 13),
        ("internvl", {"crop_to_patches": False, "max_patches": 6}, 7),
        ("internvl", {"max_patches": 1}, 1),
    ],
)
def test_crops_are_what_the_preprocessor_allows(name: str, preprocessor: dict[str, Any] | None, crops: int) -> None:
    assert read_model(name, CONFIGS[name], preprocessor).crops == crops


def test_windows_of_a_tower_make_its_attention_cheaper() -> None:
    tower = read_model("qwen", CONFIGS["qwen2_5_vl"], picture=(448, 448)).tower
    assert (tower.windowed, tower.window, tower.patches) == (2, 16, 1024)
    everywhere = replace(tower, windowed=0)
    from svdprune.exporter.estimate.costs import vision_work

    less, more = (sum(w.flops for w in vision_work(t, 1, format_of("fp16"))) for t in (tower, everywhere))
    assert more - less == 2 * 4 * 1024 * (1024 - 16) * tower.dim


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--batch", "8", "--decoder-precision", "int4"), ("--crops", "1")])
def test_the_text_fits_80_columns_and_says_that_it_is_a_model(more: tuple[str, ...], folder: Path) -> None:
    if "--crops" in more:
        (folder / "config.json").write_text(json.dumps(CONFIGS["llava_next"]))
    code, text = run(str(folder), "--keep", "4", "--rank", "4", "--target", ORIN, *more)
    assert code == 0, text
    assert NOT_MEASURED in text
    assert max(map(len, text.splitlines())) <= 80
    for word in (*STAGES, "first token", "KV cache", "fits: yes", "all/K"):
        assert word in text


def test_a_large_model_fits_80_columns_too(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    code, text = run(
        str(folder), "--keep", "32", "--target", "jetson-orin-nano", "--batch", "16", "--precision", "fp32"
    )
    assert code == 0, text
    assert max(map(len, text.splitlines())) <= 80
    assert "fits: NO; can be built there: NO" in text


def test_json_is_the_whole_estimate(folder: Path) -> None:
    code, text = run(str(folder), "--keep", "50%", "--rank", "4", "--target", ORIN, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["kind"] == NOT_MEASURED
    assert found["pruned"]["tokens"] == 8
    assert set(found["unpruned"]["stages"]) == set(STAGES)
    assert found["efficiency"]["compute"] == 0.5


def test_a_cpu_is_estimated_with_peaks_of_ones_own(folder: Path) -> None:
    code, text = run(
        str(folder), "--keep", "4", "--rank", "4", "--target", "cpu", "--tflops", "0.5", "--bandwidth", "40"
    )  # fmt: skip
    assert code == 0, text
    assert "whether it fits is not known" in text
    assert "one peak for every precision" in text


# ---- asked badly ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zzzzzz", "--keep", "4", "--target", ORIN], "there is no model 'zzzzzz': known names are mini-llava"),
        (["mini-lava", "--keep", "4", "--target", ORIN], "did you mean mini-llava"),
        (["./none", "--keep", "4", "--target", ORIN], "no folder at none"),
        (["FOLDER", "--keep", "4", "--target", "jetson-orinn"], "'jetson-orinn': did you mean jetson-orin"),
        (["FOLDER", "--keep", "17", "--target", ORIN], "cannot keep 17 tokens: the picture has 16"),
        (["FOLDER", "--keep", "0", "--target", ORIN], "keep 1 or more"),
        (["FOLDER", "--keep", "all", "--target", ORIN], "give a count such as 32 or a share"),
        (["FOLDER", "--keep", "4", "--target", "cpu"], "no peaks for cpu"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--precision", "fp8"], "FP8 tensor cores appear with sm 89"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--decoder-precision", "fp4"], "jetson-orin cannot run fp4"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--precision", "fp12"], "unknown precision 'fp12'"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--prompt-tokens", "0"], "--prompt-tokens must be 1 or more"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--batch", "-2"], "--batch must be 1 or more"),
        (["FOLDER", "--keep", "4", "--rank", "4", "--target", ORIN, "--cache", "20"], "but the cache has 20"),
        (
            ["FOLDER", "--keep", "4", "--rank", "4", "--target", ORIN, "--new-tokens", "5000"],
            "model's context has 4096",
        ),
        (["FOLDER", "--keep", "4", "--rank", "20", "--target", ORIN], "rank 20 is more than"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--select", "svd"], "unknown selector 'svd'"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--picture", "big"], "--picture is WIDTHxHEIGHT"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--picture", "640x480"], "crops of 56 x 56 and no others"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--crops", "3"], "does not cut pictures into crops"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--tflops", "-1"], "--tflops must be above 0"),
        (["FOLDER", "--keep", "4", "--target", ORIN, "--compute-efficiency", "50"], "an efficiency is a share"),
    ],
)
def test_every_bad_question_is_one_sentence(arguments: list[str], said: str, folder: Path) -> None:
    code, text = run(*[str(folder) if word == "FOLDER" else word for word in arguments])
    assert code == 2, text
    assert said in text
    assert len(text.strip().splitlines()) == 1


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, text = run(str(tmp_path), "--keep", "4", "--target", ORIN)
    assert code == 2
    assert f"{tmp_path} has no config.json" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "bert"}', "not a vision-language model: known are llava"),
        (FLORENCE, "model_type 'florence', which is not known to the estimate"),
        ('{"vision_config": {}}', "model_type None"),
        (json.dumps(llava(text_config={"model_type": "gpt2"})), "the language model is of type 'gpt2'"),
        (json.dumps(llava(vision_config={"model_type": "vit"})), "the vision tower is of type 'vit'"),
        (json.dumps(llava(text_config={"model_type": "llama", "hidden_size": "wide"})), "is not a valid llava config"),
        (json.dumps(llava(text_config={"model_type": "no-such"})), "is not a valid llava config"),
        (json.dumps(llava(vision_feature_layer=[-2, -5])), "takes features of several layers"),
        (json.dumps(llava(vision_feature_layer=-9)), "a vision tower of 3"),
        (json.dumps(CONFIGS["qwen3_vl"]), "say which with --picture"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(content: str, said: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    code, text = run(str(folder), "--keep", "4", "--target", ORIN)
    assert code == 2, text
    assert said in text


def test_a_peak_that_the_table_does_not_have_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "rtx-40", replace(TARGETS["rtx-40"], fp8_tflops=None))
    model = read_model("tiny", llava())
    with pytest.raises(UserError, match="peak of rtx-40 in fp8 is not known"):
        estimate(model, 4, "rtx-40", precision="fp8", selector=SelectorConfig(rank=4))
