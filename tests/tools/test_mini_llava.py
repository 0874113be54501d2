"""The training of the shipped model: its optimizer, its data, and that an interrupted run goes on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from svdprune.calib.scenes import Question
from tools.mini_llava import converse, pretrain
from tools.mini_llava.fit import fit
from tools.mini_llava.model import GRID, PATCH_SIZE, build, encode
from tools.mini_llava.muon import Muon, orthogonalise
from tools.mini_llava.pretrain import CHARACTERS, IGNORE, Examples
from tools.mini_llava.text import conversation, processor, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(pictures=60).save(str(file))
    return file


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_orthogonalise_levels_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.max() < 1.3
    assert values.min() > 0.3


def test_muon_finds_a_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(64, 8, generator=generator), torch.randn(8, 6, generator=generator)
    weight = nn.Parameter(torch.zeros(8, 6))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        optimizer.zero_grad()
        ((x @ weight - x @ wanted) ** 2).mean().backward()
        optimizer.step()
    assert (weight - wanted).abs().max() < 0.05


def test_dense_targets_name_what_each_patch_shows() -> None:
    window = 8
    for i in range(30):
        scene, row, column, out = pretrain.example_scene(random.Random(i), window, label_share=1.0)
        assert out["pixels"].shape == (3, window * PATCH_SIZE, window * PATCH_SIZE)
        assert out["positions"].tolist()[0] == row * GRID + column
        assert out["count"] == len(scene.objects) - 1
        shown = {int(v) for v in out["shape"] if v not in (0, IGNORE)}
        assert shown <= {1 + pretrain.SHAPES.index(o.shape) for o in scene.objects}
        written = {c for o in scene.objects for c in o.label}
        assert {CHARACTERS[v] for v in out["glyph"] if v != IGNORE} <= written


def test_training_text_is_what_the_processor_writes(tokenizer_file: Path) -> None:
    reader = converse._reader(str(tokenizer_file))
    asked = [Question("color", "What color is the star?", "red"), Question("detail", "What is written on it?", "K7")]
    ids, labels = conversation(reader, asked, 64)
    messages = []
    for i, q in enumerate(asked):
        picture = [{"type": "image"}] if i == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": q.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": q.answer}]})
    made = processor(reader)
    rendered = made.apply_chat_template(messages)
    whole = made.tokenizer(rendered)["input_ids"]
    start = converse.start_ids(reader)
    image = reader.token_to_id("<image>")
    used = int((ids != reader.token_to_id("<pad>")).sum())
    assert whole == [*start, image, *ids[:used]]
    answers = reader.decode([i for i in labels[:used] if i >= 0], skip_special_tokens=False)
    assert answers.split("</s>") == [" red", " K7", ""]


def test_a_window_of_the_whole_grid_is_the_whole_picture(tokenizer_file: Path) -> None:
    torch.manual_seed(0)
    model = build(300, 3, 1, 2, 0).eval()
    side = GRID * PATCH_SIZE
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        wanted = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encode(model, pixels, torch.arange(GRID * GRID)[None]), wanted, atol=1e-5, rtol=1e-4)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.map = nn.Linear(4, 3)

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return (self.map(batch["x"]) - 1).square().mean(), {}


def numbers(seed: str) -> dict[str, np.ndarray]:
    values = np.random.default_rng(abs(int(seed.rpartition(":")[2]))).standard_normal(4)
    return {"x": values.astype(np.float32)}


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, threads: int) -> None:
    def run(folder: Path, *stops: int) -> torch.Tensor:
        folder.mkdir()
        for stop in stops:
            model = Line()  # a new process each time
            fit(
                "stage",
                {"line": model},
                [(n, p) for n, p in model.named_parameters()],
                Examples(numbers, "x", 0, 0),
                model.loss,
                steps=12,
                batch=4,
                rate=0.01,
                folder=folder,
                device="cpu",
                workers=0,
                threads=threads,
                save_every=4,
                halt=stop,
            )
        return model.map.weight.detach()

    assert torch.equal(run(tmp_path / "whole", 12), run(tmp_path / "parts", 4, 8, 12))


def test_language_loss_reaches_the_tower(tokenizer_file: Path) -> None:
    torch.manual_seed(0)
    reader = converse._reader(str(tokenizer_file))
    model = build(reader.get_vocab_size(), reader.token_to_id("<image>"), 1, 2, 0)
    heads = pretrain.Heads(model.config.vision_config.hidden_size)
    options = {"windows": (4,), "batch": 2, "tokenizer": str(tokenizer_file), "turns": 3, "length": 40}
    batch = next(Examples(converse.example, "t", 0, 2, **options).batches(2, 0))
    start = converse.start_ids(reader)
    loss, shown = converse.loss(model, heads, batch, tower=True, dense_weight=0.0, start=start)
    loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0
    assert set(shown) == {"answer", "token"}
