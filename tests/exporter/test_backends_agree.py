"""The runtime's two decoders on one checkpoint: the exported graph answers what transformers answers, over a chat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.decoder import export_decoder
from svdprune.runtime import Vlm, load, open_bundle, write_bundle
from tests.exporter.decoder_models import make_model
from tests.runtime import tiny

QUESTIONS = ["What is this?", "And the colour?", "Why?"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny bundle with the exported decoder of a random LLaVA, and the checkpoint."""
    folder = tmp_path_factory.mktemp("backends")
    text = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=tiny.CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    make_model(text, folder / "checkpoint")
    checkpoint = Checkpoint(folder / "checkpoint")
    source = open_bundle(tiny.make_bundle(folder / "source"))
    with write_bundle(folder / "bundle") as writer:
        for name in source.manifest.files:
            if not name.startswith("decoder/"):
                writer.file(name).write_bytes(source.file(name).read_bytes())
        info = export_decoder(checkpoint, checkpoint.config["text_config"], writer.path / "decoder")
        fields = {name: getattr(info, name) for name in ("layers", "kv_heads", "head_dim", "kv_cache", "context")}
        writer.manifest = tiny.manifest(decoder=fields)
    return folder / "bundle", folder / "checkpoint"


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_answers_and_logits_agree(exported: tuple[Path, Path], policy: str) -> None:
    bundle, checkpoint = exported
    ours = load(bundle, threads=1, positions=policy)
    reference = load(bundle, threads=1, positions=policy, decoder="transformers", checkpoint=str(checkpoint))
    assert ours.manifest.decoder.kv_cache == "shared"
    sight = ours.see(tiny.picture())
    logits = [vlm.first_logits(sight, QUESTIONS[0]) for vlm in (ours, reference)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3 * np.abs(logits[1]).max())
    assert talk(ours) == talk(reference)


def talk(vlm: Vlm) -> list[list[int]]:
    """Ids of the answers to ``QUESTIONS`` in one chat, greedy."""
    chat = vlm.chat(tiny.picture())
    return [chat.ask(question, max_new_tokens=12).token_ids for question in QUESTIONS]
