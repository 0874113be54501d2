"""The checkpoint that ships: it loads as any LLaVA does, looks at the picture, and answers from 32 of its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from svdprune.calib.sources import open_source
from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.evaluate.contenders import parse_contenders
from svdprune.exporter.evaluate.model import Model
from svdprune.exporter.evaluate.run import evaluate_model
from svdprune.exporter.export import ExportRequest, export_model
from svdprune.exporter.source import shipped_folder
from svdprune.runtime import load
from svdprune.runtime.verify import verify
from tools.demo_picture import DEMO_SEED, draw

# Far below what the model card reports (a check on a few pictures is coarse) and far above the best blind guess,
# which is right about one time in four: what must not happen is that the picture stops mattering.
UNPRUNED_FLOOR, PRUNED_FLOOR = 0.5, 0.42


def test_it_is_small() -> None:
    files = [f for f in shipped_folder().iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in files}


def test_it_loads_and_answers_with_transformers_alone() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(shipped_folder(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(shipped_folder())
    scene, question = draw(0, "count")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    inputs = processor(images=np.asarray(scene.image), text=prompt, return_tensors="pt")
    vision = model.config.vision_config
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == (vision.image_size // vision.patch_size) ** 2
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() in {"one", "two", "three", "four", "five"}


def test_it_looks_at_the_picture_pruned_or_not() -> None:
    model = Model(Checkpoint(shipped_folder()), "mini-llava")
    source = open_source("scenes:floor", limit=25, seed=0)
    report = evaluate_model(model, "mini-llava", source, parse_contenders(["leverage"]), [32], ["compact"])
    shares = {row.selector: row.accuracy.value for row in report.rows if row.accuracy is not None}
    assert shares["none"] > UNPRUNED_FLOOR
    assert shares["leverage"] > PRUNED_FLOOR


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shipped") / "bundle"
    export_model(ExportRequest("mini-llava", "32", out=out))
    return out


def test_the_bundle_gives_the_demos_right_answer(bundle: Path) -> None:
    scene, question = draw(DEMO_SEED, "color")
    answer = load(bundle).ask(scene.image, question.text)
    assert answer.text == question.answer
    assert (answer.tokens.vision_total, answer.tokens.vision_kept) == (576, 32)


def test_the_bundle_passes_its_own_check(bundle: Path) -> None:
    report = verify(bundle)
    assert report.passed, report
