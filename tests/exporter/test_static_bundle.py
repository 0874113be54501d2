"""A bundle with a decoder graph for engines: what is in it, what its manifest says, and that the graph answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from svdprune.exporter.export import ExportRequest, export_model
from svdprune.runtime import load, open_bundle
from svdprune.runtime.cli.app import group
from svdprune.runtime.decoder.embedding import Embedding
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import DecoderEngineInfo
from svdprune.runtime.positions import one_picture, picture_place, splice
from svdprune.runtime.verify import verify
from svdprune.runtime.verify_golden import read_golden


def request(model: Path, out: Path, **options: object) -> ExportRequest:
    given = {"model": str(model), "keep": "4", "rank": 4, "out": out, "target": "jetson-orin-nano", **options}
    return ExportRequest(**given)  # type: ignore[arg-type]


def test_both_decoders_are_written_and_share_the_embedding_table(tiny_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    summary = export_model(request(tiny_llava, out, cache=96))
    assert sorted(path.name for path in (out / "decoder").iterdir()) == [
        "embed_tokens.npy",
        "engine.onnx",
        "engine.onnx.data",
        "model.onnx",
        "model.onnx.data",
    ]
    vlm = load(out)  # every hash is checked
    decoder = vlm.bundle.manifest.decoder
    assert decoder.engine == DecoderEngineInfo("decoder/engine.onnx", "fp16", 24, 96)
    assert decoder.engine_refused is not None
    assert "JetPack 6.2" in decoder.engine_refused
    assert (summary.cache, summary.engine_refused) == (96, decoder.engine_refused)
    named = ("vision", "decoder", "embeddings", "decoder for engines")
    assert all(summary.sizes[name] > 0 for name in named)
    assert sum(summary.sizes[name] for name in named) < summary.sizes["bundle"]
    assert summary.sizes["decoder for engines"] == sum(f.stat().st_size for f in out.glob("decoder/engine.onnx*"))
    assert summary.sizes["decoder for engines"] < summary.sizes["decoder"]  # half the digits
    assert verify(out).passed
    inspected = CliRunner().invoke(group, ["inspect", str(out)], catch_exceptions=False)
    lines = " ".join(inspected.stdout.split())
    assert "decoder for engines fp16, opset 24, KV cache of 96 rows; TensorRT 10.3 (JetPack 6.2) cannot" in lines


def test_the_graph_gives_the_golden_logits(tiny_llava: Path, tmp_path: Path) -> None:
    """The golden prompt's rows through the engine's graph, in float16: the logits that transformers gave in float32."""
    out = tmp_path / "bundle"
    export_model(request(tiny_llava, out, target="rtx-40", positions="original"))
    bundle = open_bundle(out)
    decoder, golden = bundle.manifest.decoder, read_golden(bundle)
    assert decoder.engine is not None
    assert decoder.engine_refused is None
    assert decoder.engine.cache == decoder.context  # 256: below the usual 2048
    embed = Embedding(bundle.file(decoder.embedding), decoder.vocab, decoder.hidden)
    place = picture_place(golden.prompt_ids, bundle.manifest.processor.image_token_id)
    layout = one_picture(place, golden.kept, bundle.manifest.vision.tokens, "original")
    positions = layout.span(0, len(golden.prompt_ids))
    assert np.diff(positions).max() > 1  # with gaps
    rows = splice(golden.prompt_ids, place, golden.features, embed)
    shape = (1, decoder.kv_heads, decoder.engine.cache, decoder.head_dim)
    feeds = {
        "inputs_embeds": rows[None],
        "position_ids": positions[None],
        "write_index": np.zeros(1, np.int64),
        **{
            f"past.{i}.{part}": np.full(shape, 7, np.float16)
            for i in range(decoder.layers)
            for part in ("key", "value")
        },
    }
    session = ort.InferenceSession(out / decoder.engine.file, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], feeds)[0][0, 0]
    np.testing.assert_allclose(logits, golden.logits, atol=0.01 * np.abs(golden.logits).max())


def test_no_graph_where_none_is_wanted(tiny_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    summary = export_model(request(tiny_llava, out, decoder_engine="none"))
    decoder = open_bundle(out).manifest.decoder
    assert decoder.engine is None
    assert (decoder.engine_refused or "").startswith("it was exported with --decoder-engine none")
    assert not list(out.glob("decoder/engine*"))
    assert "decoder for engines" not in summary.sizes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": 257}, "longer than the model's context: give --cache 256 or less"),
        ({"cache": 67}, "cannot hold 4 vision tokens"),
        ({"cache": 96, "target": "cpu"}, "the target cpu runs no TensorRT"),
    ],
    ids=["long", "short", "cpu"],
)
def test_a_cache_that_cannot_be_is_refused_before_any_work(
    tiny_llava: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export_model(request(tiny_llava, tmp_path / "bundle", **options))
    assert list(tmp_path.iterdir()) == []
