"""Greedy answers of transformers, whatever its release, to prompts with all of a picture's rows or some of them.

    python tools/families/reference.py WORK

Run by `python -m tools.families`, also by the Python of another environment: this file imports torch, transformers,
Pillow and NumPy and nothing of svdprune. `WORK/cases.json` says the checkpoint and the cases; `WORK/reference.json` and
`WORK/reference.npz` are written. The picture goes through the processor and the vision part of transformers, the prompt
through its language model with a cache, one token a step, as `generate` does it; the unpruned prompt's rows that were
not kept are left out.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def load(folder: str) -> Any:
    """The model in float32; every weight must be there, for a random one would answer too."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if kind in ("missing_keys", "unexpected_keys") and names}
    if wrong:
        raise SystemExit(f"the weights of {folder} do not fit transformers {transformers.__version__}: {wrong}")
    return model.eval()


def flat(found: Any) -> torch.Tensor:
    """Rows (n, H) from what `get_image_features` gives: a tensor or a list of them, in an object or not."""
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        return torch.cat([flat(part) for part in found])
    return found.reshape(-1, found.shape[-1])


def features(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """Rows (n, H) of a processed picture, and Qwen3-VL's levels (a list of (n, H)), None for the others."""
    taken = inspect.signature(model.model.get_image_features).parameters
    found = model.model.get_image_features(**{name: value for name, value in inputs.items() if name in taken})
    levels = getattr(found, "deepstack_features", None)
    if isinstance(found, tuple) and not hasattr(found, "pooler_output") and "qwen3_vl" in model.config.model_type:
        found, levels = found
    return flat(found), None if levels is None else [flat(level) for level in levels]


def places_of(model: Any, ids: torch.Tensor, inputs: Any, image: int) -> torch.Tensor:
    """Positions (axes, n) of the unpruned prompt."""
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(ids.shape[1])[None]
    given: dict[str, Any] = {"input_ids": ids, "image_grid_thw": inputs["image_grid_thw"]}
    if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
        given["mm_token_type_ids"] = (ids == image).int()
    return model.model.get_rope_index(**given)[0][:, 0]


@torch.no_grad()
def answer(model: Any, case: dict[str, Any], inputs: Any) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens, the end token included; logits (steps, V); the picture's kept rows (r, H)."""
    kept, ids = torch.tensor(case["kept"]), torch.tensor([case["ids"]])
    picture = ids[0] == case["image_token"]
    rows = model.get_input_embeddings()(ids)[0].clone()
    made, levels = features(model, inputs)
    rows[picture] = made
    places = places_of(model, ids, inputs, case["image_token"])
    places = torch.arange(len(kept)).expand(len(places), -1) if case["positions"] == "compact" else places[:, kept]
    if model.config.model_type == "paligemma":
        places = places + 1  # as its forward counts when nobody says
    extra: dict[str, Any] = {}
    if case["mask"] != "causal":  # which rows see each other; of the prompt alone, what follows it is causal
        extra["token_type_ids"] = (
            picture[kept].long()[None] if case["mask"] == "picture" else torch.zeros(1, len(kept)).long()
        )
    if levels is not None:
        order = torch.full((len(picture),), -1)
        order[picture] = torch.arange(int(picture.sum()))
        which = order[kept][picture[kept]]
        extra["visual_pos_masks"] = picture[kept][None]
        extra["deepstack_visual_embeds"] = [level[which] for level in levels]
    run = model if levels is None else _headed(model)
    shape = (lambda p: p) if len(places) == 1 else (lambda p: p[:, None])
    tokens: list[int] = []
    logits = []
    cache, new, seen = None, rows[kept][None], 0
    while len(tokens) < case["limit"]:
        seen += new.shape[1]
        out = run(
            inputs_embeds=new,
            position_ids=shape(places),
            attention_mask=torch.ones(1, seen, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        cache, extra = out.past_key_values, {}
        logits.append(out.logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] in case["eos"]:
            break
        new, places = model.get_input_embeddings()(torch.tensor([tokens[-1:]])), places[:, -1:] + 1
    scale = 1.0  # before transformers 5, PaliGemma divided here and multiplied again in the language model
    if model.config.model_type == "paligemma" and int(transformers.__version__.split(".")[0]) < 5:
        scale = rows.shape[1] ** 0.5
    return tokens, torch.stack(logits).numpy(), scale * rows[kept][picture[kept]].numpy()


def _headed(model: Any) -> Any:
    """The language model and its head, for what the whole model's forward takes from pixels alone."""

    def run(**given: Any) -> Any:
        out = model.model.language_model(**given)
        out["logits"] = model.lm_head(out.last_hidden_state)
        return out

    return run


def main(work: Path) -> None:
    asked = json.loads((work / "cases.json").read_text())
    torch.set_num_threads(1)
    model = load(asked["checkpoint"])
    processor = transformers.AutoImageProcessor.from_pretrained(asked["checkpoint"])
    said, arrays = [], {}
    for number, case in enumerate(asked["cases"]):
        with Image.open(work / case["picture"]) as opened:
            picture = opened.convert("RGB")
        inputs = processor(images=[[picture]] if case["nested"] else picture, return_tensors="pt", **case["images"])
        tokens, logits, rows = answer(model, case, inputs)
        said.append(tokens)
        arrays |= {f"logits{number}": logits, f"rows{number}": rows}
    np.savez(work / "reference.npz", **arrays)
    (work / "reference.json").write_text(json.dumps({"transformers": transformers.__version__, "tokens": said}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
