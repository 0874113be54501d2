"""Parameters and FLOPs of the estimate against transformers' models and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from svdprune.exporter.estimate.costs import connector_work, decoder_work, format_of, vision_work
from svdprune.exporter.estimate.counting import Counting, selection_work
from svdprune.exporter.estimate.families import FAMILIES, read_model
from svdprune.exporter.estimate.shapes import Model
from svdprune.exporter.selection import SelectorConfig, build_selector, selector_names
from svdprune.exporter.selection.ops import Ops
from svdprune.runtime.errors import UserError
from svdprune.runtime.roofline import Work
from tests.exporter.estimate_models import CONFIGS, LLAMA, PICTURES

CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def model_of(name: str, **changed: Any) -> Model:
    config = {**CONFIGS[name], **changed}
    return read_model(name, config, picture=PICTURES.get(name))


def built(name: str, device: str) -> torch.nn.Module:
    config = AutoConfig.for_model(**CONFIGS[name])
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def parameters(module: torch.nn.Module, *words: str) -> int:
    """Of the parameters whose name holds one of the words, each once."""
    return sum(p.numel() for name, p in module.named_parameters() if any(word in name for word in words))


def flops(works: list[Work]) -> float:
    return sum(work.flops for work in works)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def test_every_family_is_checked_here() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    whole, mine = built(name, "meta"), model_of(name, vision_feature_layer=-1)  # -1: every layer of the tower
    vision = parameters(whole, "vision", "visual", "projector", "connector")
    if name.startswith("llava"):
        vision -= parameters(whole, "post_layernorm", "vision_tower.layernorm")  # after the tap
    assert mine.vision_parameters == vision
    text = parameters(whole, "language_model", "text_model", "lm_head")
    assert mine.text.parameters == text


def test_parameters_of_the_shapes_of_llava_7b() -> None:
    text_config = {"model_type": "llama", "vocab_size": 32064}
    config = {"model_type": "llava", "vision_config": CLIP_L, "text_config": text_config}
    mine = read_model("llava", config)
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**{**CLIP_L, "num_hidden_layers": 23}))
        text = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32064))
    assert mine.tower.run == 23
    assert mine.tower.parameters == parameters(tower, "") - parameters(tower, "post_layernorm")
    assert mine.text.parameters == parameters(text, "")


@pytest.mark.parametrize(
    ("name", "shape", "layers"), [("llava", CONFIGS["llava"]["vision_config"], 2), ("L", CLIP_L, 23)]
)
def test_flops_of_clip_are_those_that_torch_counts(name: str, shape: dict[str, Any], layers: int) -> None:
    config = {"model_type": "llava", "vision_config": shape, "text_config": LLAMA}
    mine = read_model(name, config)
    side = shape["image_size"]
    with torch.device("meta"):
        tower = CLIPVisionModel._from_config(
            CLIPVisionConfig(**{**shape, "num_hidden_layers": layers}), attn_implementation="eager"
        )
        pixels = torch.zeros(2, 3, side, side)
    assert flops(vision_work(mine.tower, 2, format_of("fp16"))) == counted(lambda: tower(pixels))


@pytest.mark.parametrize(
    "name", ["llava with SigLIP", "llava with DINOv2", "internvl", "idefics3", "smolvlm", "paligemma", "gemma3"]
)
def test_flops_of_towers_of_fixed_size_and_their_connectors(name: str) -> None:
    whole, mine = built(name, "cpu"), model_of(name)
    form = format_of("fp16")
    works = vision_work(mine.tower, 1, form) + connector_work(mine.connector, mine.tokens, form)
    pixels = torch.rand(1, 3, 56, 56)  # a picture of zeros is taken for padding
    if name in ("idefics3", "smolvlm"):
        pixels = pixels[None]
    assert flops(works) == counted(lambda: whole.model.get_image_features(pixels))  # type: ignore[union-attr,operator]


def test_a_dinov2_takes_the_pictures_that_its_processor_makes() -> None:
    config, size = CONFIGS["llava with DINOv2"], {"height": 42, "width": 70}
    assert read_model("dino", config).tower.taken == 16
    assert read_model("dino", config, {"crop_size": size}).tower.taken == 15
    assert read_model("dino", config, {"size": size}, picture=(28, 28)).tower.taken == 4
    with pytest.raises(UserError, match="no whole number"):
        read_model("dino", config, picture=(30, 28))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_flops_of_towers_that_take_any_picture(name: str) -> None:
    whole, mine = built(name, "cpu"), model_of(name)
    tower = mine.tower
    patches = torch.zeros(tower.patches, tower.channels * tower.frames * tower.patch**2)
    grid = torch.tensor([[1, tower.height // tower.patch, tower.width // tower.patch]])
    works = vision_work(tower, 1, format_of("fp16")) + connector_work(mine.connector, mine.tokens, format_of("fp16"))
    assert flops(works) == counted(lambda: whole.model.visual(patches, grid_thw=grid))  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("name", ["llava", "llava with SigLIP", "llava_next", "internvl"])
def test_flops_of_prefill_and_of_a_step(name: str) -> None:
    """torch counts the whole square of attention, of which a causal kernel computes the lower half."""
    text = AutoConfig.for_model(**CONFIGS[name]["text_config"])
    model = AutoModelForCausalLM.from_config(text, attn_implementation="eager").eval()
    rows = torch.zeros(2, 40, text.hidden_size)
    mine = model_of(name).text
    works = decoder_work(mine, 40, 0, 2, format_of("fp16"))
    attention = next(work for work in works if work.name == "attention")
    whole_square = attention.flops * (2 * 40 / 41 - 1)
    total = counted(lambda: model(inputs_embeds=rows, logits_to_keep=1, use_cache=False))
    assert flops(works) + whole_square == pytest.approx(total, rel=1e-12)
    step, wide = decoder_work(mine, 1, 39, 2, format_of("fp16")), decoder_work(mine, 1, 0, 2, format_of("fp16"))
    assert flops(step) - flops(wide) == 4 * 2 * 39 * mine.heads * mine.head_dim * mine.layers


def test_a_sliding_window_limits_what_is_looked_at() -> None:
    text = model_of("llava", text_config={**LLAMA, "model_type": "mistral", "sliding_window": 8}).text

    def attention(rows: int, past: int) -> Work:
        return next(w for w in decoder_work(text, rows, past, 1, format_of("fp16")) if w.name == "attention")

    each = 4 * text.heads * text.head_dim * text.layers
    assert attention(20, 0).flops == each * (sum(range(1, 9)) + 12 * 8)
    assert attention(1, 100).flops == each * 8


@pytest.mark.parametrize("name", selector_names())
def test_the_cost_of_every_selector_is_counted_from_its_own_text(name: str) -> None:
    config = SelectorConfig(name, rank=4)
    keep = 96 if name == "none" else 5
    selector = build_selector(config, 96, 40, grid=(12, 8), keep=keep)
    works = selection_work(config, 96, 40, keep, 3, (12, 8))
    total = counted(lambda: selector(torch.rand(3, 96, 40), torch.rand(3, 96)))
    assert flops(works) == total
    assert all(work.precision == "fp32" for work in works)
    assert {work.name for work in works} >= {"top k", "gather"}


def test_the_variance_rule_costs_what_torch_counts() -> None:
    config = SelectorConfig("leverage", variance=0.9)
    selector = build_selector(config, 96, 80)
    assert flops(selection_work(config, 96, 80, 5, 1, (12, 8))) == counted(lambda: selector(torch.rand(1, 96, 80)))


def test_counting_knows_every_operator_that_scorers_may_use() -> None:
    wanted = {name for name in vars(Ops) if not name.startswith("_")}
    assert wanted <= {name for name in dir(Counting) if not name.startswith("_")}


@pytest.mark.parametrize("config", [SelectorConfig(), SelectorConfig(variance=0.9), SelectorConfig("dpp")])
def test_kernels_are_no_more_than_the_nodes_of_the_graph(config: SelectorConfig) -> None:
    from svdprune.exporter.selection import selector_model

    nodes = [node.op_type for node in selector_model(config, 96, 80, grid=(12, 8), keep=5).graph]
    works = [work for work in selection_work(config, 96, 80, 5, 1, (12, 8)) if work.name == "matrix product"]
    assert len(works) == nodes.count("MatMul")
