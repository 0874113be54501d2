"""What ``profile`` found, as dataclasses that go into JSON as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from svdprune.runtime.profile.layers import LayerTable
from svdprune.runtime.profile.stats import Summary

PREPROCESS, VISION, SELECTION = "preprocess", "vision", "selection"
PREFILL, DECODE, FIRST_TOKEN, TOTAL = "prefill", "decode", "first_token", "total"
STAGES = (PREPROCESS, VISION, SELECTION, PREFILL, DECODE, FIRST_TOKEN, TOTAL)


@dataclass(frozen=True)
class Arm:
    """One of the two graphs that were run in turn.

    Attributes:
        name: "pruned" or "unpruned".
        tokens: vision tokens that reach the decoder.
        prompt: rows of the prompt, these among them.
        stages: seconds by stage (``STAGES``). ``selection`` is within ``vision``, from the layers' times; ``decode`` is
            one token; ``first_token`` is preprocess, vision and prefill; ``total`` adds all decoded tokens.
        layers: of the vision graph, where the backend can tell.
        notes: what could not be measured, and why.
    """

    name: str
    tokens: int
    prompt: int
    stages: dict[str, Summary]
    layers: LayerTable | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Where:
    """What the figures are figures of.

    Attributes:
        kind: "CPU" or "GPU".
        processor: the CPU's name, or the GPU's.
        cores: logical CPU cores that the process may use.
        threads: asked for; None where the backend chose.
        load: the machine's load average over the last minute when the run began, None where it is not known.
        versions: of Python and the packages that ran.
    """

    kind: str
    processor: str
    cores: int
    threads: int | None
    load: float | None
    versions: dict[str, str]


@dataclass(frozen=True)
class ProfileReport:
    """A profile of a bundle.

    Attributes:
        bundle, model: its folder and the model's id.
        target: that it was exported for.
        vision, decoder: the backends; ``vision_precision`` and ``decoder_precision`` what they compute in.
        image, question: the input.
        tokens: vision tokens of the picture, T.
        runs, warm_up, new_tokens: how often, after how many uncounted runs, and how many tokens each run decodes.
        where: the machine.
        pruned, unpruned: the two arms; None for the second when it was left out.
        ratios: unpruned over pruned, of the medians, by stage.
    """

    bundle: str
    model: str
    target: str
    vision: str
    vision_precision: str
    decoder: str
    decoder_precision: str
    image: str
    question: str
    tokens: int
    runs: int
    warm_up: int
    new_tokens: int
    where: Where
    pruned: Arm
    unpruned: Arm | None
    ratios: dict[str, float]


def ratios(pruned: Arm, unpruned: Arm | None) -> dict[str, float]:
    """Unpruned over pruned, of the medians of the stages that both have; preprocessing is one and the same."""
    if unpruned is None:
        return {}
    both = (stage for stage in STAGES if stage in pruned.stages and stage in unpruned.stages and stage != PREPROCESS)
    return {stage: unpruned.stages[stage].median / pruned.stages[stage].median for stage in both}
