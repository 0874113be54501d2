"""The three forms of each selector: float64 reference, torch, ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from svdprune.exporter.selection import (
    SelectorConfig,
    build_selector,
    keep_indices,
    reference_scores,
    selector_model,
    selector_names,
)
from svdprune.exporter.selection.coverage import cell_count, cells_of
from svdprune.exporter.selection.leverage import TIE, merge_ties, sketch, sketched, start_block
from svdprune.exporter.selection.ops import TorchOps
from svdprune.exporter.selection.polynomials import sign_steps
from svdprune.exporter.selection.reference import leverage_scores, variance_rank
from svdprune.exporter.selection.registry import Task
from svdprune.runtime.errors import NumericalError

GRID = (6, 8)
T, D, K = 48, 40, 12

Run = Callable[..., np.ndarray]


def photo_like(seed: int, tokens: int = T, channels: int = D, decay: float = 1.0) -> np.ndarray:
    """Features (T, D) with a dominant mean, singular values that fall like j^-decay, and uneven tokens."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, channels + 1) ** -decay
    x = rng.standard_normal((tokens, channels)) * falling * np.exp(0.5 * rng.standard_normal((tokens, 1)))
    turned = x @ np.linalg.qr(rng.standard_normal((channels, channels)))[0]
    return (turned + rng.standard_normal(channels)).astype(np.float32)


def attention(batch: int) -> np.ndarray:
    weights = np.random.default_rng(9).random((batch, T)).astype(np.float32)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def onnx_runner(config: SelectorConfig, tokens: int = T, channels: int = D, **given: object) -> Run:
    given = {"grid": GRID, "keep": tokens if config.name == "none" else K, **given}
    model = selector_model(config, tokens, channels, **given)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(features: np.ndarray) -> np.ndarray:
        feeds = {"tokens_in": features}
        if config.needs_cls_attention:
            feeds["cls_attention"] = attention(len(features))
        return np.asarray(session.run(None, feeds)[0])

    return run


def torch_runner(config: SelectorConfig, tokens: int = T, channels: int = D, **given: object) -> Run:
    given = {"grid": GRID, "keep": tokens if config.name == "none" else K, **given}
    module = build_selector(config, tokens, channels, **given)  # type: ignore[arg-type]
    return lambda features: module(torch.from_numpy(features), torch.from_numpy(attention(len(features)))).numpy()


def gpu_runner(config: SelectorConfig, tokens: int = T, channels: int = D, **given: object) -> Run:
    """The ONNX form for a GPU."""
    return onnx_runner(config, tokens, channels, gpu=True, **given)


RUNNERS = pytest.mark.parametrize("runner", [onnx_runner, gpu_runner, torch_runner], ids=["onnx", "gpu", "torch"])


def reference(config: SelectorConfig, features: np.ndarray) -> np.ndarray:
    keep = T if config.name == "none" else K
    rows = [
        reference_scores(config, x, a, grid=GRID, keep=keep)
        for x, a in zip(features, attention(len(features)), strict=True)
    ]
    return np.stack(rows)


@RUNNERS
@pytest.mark.parametrize("name", selector_names())
def test_every_selector_keeps_what_the_reference_keeps(runner: Callable[..., Run], name: str) -> None:
    config = SelectorConfig(name=name, rank=6)
    keep = T if name == "none" else K
    features = np.stack([photo_like(seed) for seed in range(4)])
    scores = runner(config)(features)
    assert scores.shape == (4, T) and scores.dtype == np.float32
    np.testing.assert_array_equal(keep_indices(scores, keep), keep_indices(reference(config, features), keep))


@RUNNERS
@pytest.mark.parametrize("rank", [1, 3, 10, 20])
@pytest.mark.parametrize("centre", [False, True])
def test_leverage_scores_are_those_of_the_exact_svd(runner: Callable[..., Run], rank: int, centre: bool) -> None:
    config = SelectorConfig(rank=rank, centre=centre)
    features = np.stack([photo_like(seed) for seed in range(3)])
    scores = runner(config)(features)
    np.testing.assert_allclose(scores, reference(config, features), rtol=0.02, atol=1e-4)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-5)


@RUNNERS
def test_a_block_much_narrower_than_the_features_is_enough(runner: Callable[..., Run]) -> None:
    features = photo_like(1, 120, 100)[None]
    config = SelectorConfig(rank=6, block=24, iterations=3)
    exact = leverage_scores(features[0], 6)
    np.testing.assert_allclose(runner(config, 120, 100)(features)[0], exact, rtol=0.05, atol=2e-4)


@RUNNERS
def test_a_calibrated_start_is_used(runner: Callable[..., Run]) -> None:
    x = photo_like(1, 120, 100)
    exact = leverage_scores(x, 6)
    config = SelectorConfig(rank=6, block=12, iterations=1)
    own = np.linalg.svd(x.astype(np.float64), full_matrices=False)[2][:12].T

    def miss(start: np.ndarray | None) -> float:
        return float(np.abs(runner(config, 120, 100, start=start)(x[None])[0] - exact).max())

    assert miss(own) < 1e-4 < miss(None)


@RUNNERS
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95])
def test_the_variance_rule_chooses_the_papers_rank_for_each_picture(runner: Callable[..., Run], share: float) -> None:
    config = SelectorConfig(variance=share)
    features = np.stack([photo_like(0), photo_like(1, decay=0.6), photo_like(2, decay=1.5)])
    limit = config.rank_limit(config.columns(T, D))
    ranks = [variance_rank(np.linalg.svd(x.astype(np.float64))[1], share, limit) for x in features]
    assert share < 0.9 or len(set(ranks)) > 1
    expected = np.stack([leverage_scores(x, rank) for x, rank in zip(features, ranks, strict=True)])
    np.testing.assert_allclose(runner(config)(features), expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", selector_names())
def test_torch_and_onnx_agree(name: str) -> None:
    config = SelectorConfig(name=name, rank=8)
    features = np.stack([photo_like(7), np.random.default_rng(8).standard_normal((T, D)).astype(np.float32)])
    np.testing.assert_allclose(onnx_runner(config)(features), torch_runner(config)(features), rtol=1e-3, atol=1e-7)


@RUNNERS
@pytest.mark.parametrize("name", selector_names())
def test_pictures_of_a_batch_do_not_touch_each_other(runner: Callable[..., Run], name: str) -> None:
    if name == "cls":
        pytest.skip("its scores are its input")
    run = runner(SelectorConfig(name=name, rank=5))
    features = np.stack([photo_like(3), 1e4 * photo_like(4), np.zeros((T, D), np.float32)])
    alone = np.concatenate([run(x[None]) for x in features])
    np.testing.assert_allclose(run(features), alone, rtol=1e-3, atol=1e-7)


@RUNNERS
@pytest.mark.parametrize("name", selector_names())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_spoils_all_scores_of_its_picture_and_no_others(
    runner: Callable[..., Run], name: str, bad: float
) -> None:
    features = np.stack([photo_like(5), photo_like(6)])
    features[1, 7, 3] = bad
    scores = runner(SelectorConfig(name=name, rank=5))(features)
    assert np.isfinite(scores[0]).all()
    if name == "norm":  # each token's own norm: at least the bad one is spoiled
        assert not np.isfinite(scores[1]).all()
    else:
        assert np.isnan(scores[1]).all()
    with pytest.raises(NumericalError, match="no choice of tokens"):
        keep_indices(scores, K)


@RUNNERS
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30])
@pytest.mark.parametrize("name", ["leverage", "norm", "maxmin", "dpp"])
def test_the_scale_of_the_features_does_not_change_the_choice(
    runner: Callable[..., Run], name: str, size: float
) -> None:
    run = runner(SelectorConfig(name=name, rank=6))
    x = photo_like(11)[None]
    np.testing.assert_array_equal(keep_indices(run(x), K), keep_indices(run(np.float32(size) * x), K))


@RUNNERS
def test_massive_outlier_tokens_do_not_drown_the_rest(runner: Callable[..., Run]) -> None:
    x = photo_like(12)
    x[[3, 17]] *= 100.0
    x[:, 5] += 30.0
    config = SelectorConfig(rank=8)
    kept = keep_indices(runner(config)(x[None])[0], K)
    assert {3, 17} <= set(kept)
    np.testing.assert_array_equal(kept, keep_indices(leverage_scores(x, 8), K))


@RUNNERS
@pytest.mark.parametrize("name", ["leverage", "norm", "maxmin", "dpp"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.37, 1e4])
def test_a_constant_picture_keeps_the_first_tokens(
    runner: Callable[..., Run], name: str, centre: bool, value: float
) -> None:
    token = np.float32(value) * np.random.default_rng(0).standard_normal(D).astype(np.float32)
    scores = runner(SelectorConfig(name=name, rank=6, centre=centre))(np.tile(token, (1, T, 1)))
    np.testing.assert_array_equal(keep_indices(scores, K)[0], np.arange(K))


@RUNNERS
@pytest.mark.parametrize("name", ["leverage", "leverage-dpp", "maxmin", "dpp"])
def test_identical_tokens_are_tied_and_the_lowest_index_is_kept(runner: Callable[..., Run], name: str) -> None:
    kinds = np.random.default_rng(1).standard_normal((4, D)).astype(np.float32) * [[8], [4], [2], [1]]
    features = kinds[np.arange(T) % 4].astype(np.float32)[None]  # tokens 0, 4, 8, ... are the same, and so on
    config = SelectorConfig(name=name, rank=2)
    scores = runner(config)(features)
    if name == "leverage":
        for kind in range(4):
            assert len(np.unique(scores[0, kind::4])) == 1
    np.testing.assert_array_equal(keep_indices(scores, K), keep_indices(reference(config, features), K))


@RUNNERS
def test_a_rank_above_that_of_the_features_counts_what_there_is(runner: Callable[..., Run]) -> None:
    rng = np.random.default_rng(2)  # whole numbers: rank 3 exactly, in float32 too
    features = (rng.integers(-4, 5, (T, 3)) @ rng.integers(-4, 5, (3, D))).astype(np.float32)
    scores = runner(SelectorConfig(rank=10))(features[None])[0]
    np.testing.assert_allclose(scores, leverage_scores(features, 3), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(leverage_scores(features, 10), leverage_scores(features, 3), rtol=1e-9)


@RUNNERS
def test_equal_singular_values_at_the_cut_leave_the_choice_among_their_directions(runner: Callable[..., Run]) -> None:
    features = np.zeros((T, D), np.float32)
    features[np.arange(10), np.arange(10)] = 1.0  # ten equal singular values; the cut asks for six: any six are exact
    scores = runner(SelectorConfig(rank=6))(features[None])[0]
    np.testing.assert_allclose(scores[:10].sum(), 1.0, rtol=1e-5)
    assert (scores[10:] < 1e-6).all()
    assert set(keep_indices(scores, 6)) <= set(range(10))


@RUNNERS
def test_keeping_everything_and_tiny_features(runner: Callable[..., Run]) -> None:
    features = photo_like(3, 5, 3)[None]
    scores = runner(SelectorConfig(rank=2), 5, 3, grid=(1, 5), keep=5)(features)
    np.testing.assert_allclose(scores[0], leverage_scores(features[0], 2), rtol=0.01, atol=1e-4)
    np.testing.assert_array_equal(keep_indices(scores, 5)[0], np.arange(5))


def test_torch_computes_in_float32_whatever_it_is_given() -> None:
    x = torch.from_numpy(photo_like(1))[None].half()
    module = build_selector(SelectorConfig(rank=6), T, D)
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), module(x.float()), rtol=0, atol=0)


def test_keep_indices_takes_the_lowest_of_equal_scores_in_ascending_order() -> None:
    scores = np.array([[0.1, 0.5, 0.5, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(keep_indices(scores, 3), [[1, 2, 4], [0, 1, 2]])
    assert keep_indices(scores, 5).dtype == np.int64


def test_seeded_starts_differ_by_seed_and_have_orthonormal_columns() -> None:
    blocks = [start_block(Task(SelectorConfig(rank=4, block=16, seed=seed), T, D)) for seed in (0, 1)]
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(16), atol=1e-6)
    assert not np.allclose(*blocks)


@RUNNERS
@pytest.mark.parametrize("tokens", [256, 300], ids=["whole", "padded"])
def test_a_sketch_of_the_tokens_is_as_good_a_start(runner: Callable[..., Run], tokens: int) -> None:
    features = photo_like(1, tokens, 100)[None]
    config = SelectorConfig(rank=8)
    assert sketched(Task(config, tokens, 100)) and not sketched(Task(config, tokens, 100, padded=True))
    exact = leverage_scores(features[0], 8)
    np.testing.assert_allclose(runner(config, tokens, 100)(features)[0], exact, rtol=0.05, atol=1e-4)
    same = np.tile(features[:, :1], (1, tokens, 1))
    np.testing.assert_array_equal(keep_indices(runner(config, tokens, 100)(same), K)[0], np.arange(K))


def test_sketches_differ_by_seed() -> None:
    features = torch.from_numpy(photo_like(1, 256, 100))[None]
    first, second, again = (
        sketch(TorchOps(), features, Task(SelectorConfig(rank=8, seed=seed), 256, 100)) for seed in (0, 1, 0)
    )
    assert first.shape == (1, 100, 64) and not torch.allclose(first, second)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_sign_steps_bring_every_value_of_the_range_to_one() -> None:
    scale, gains = sign_steps(1e-3, 11)
    x = scale * np.geomspace(1e-3, 1.0, 999)
    for gain in gains:
        x = x * (gain - x * x)
    np.testing.assert_allclose(x, 1.0, atol=1e-6)


def test_scores_that_differ_by_rounding_become_equal_and_others_keep_their_order() -> None:
    rng = np.random.default_rng(4)
    exact = rng.permutation(np.repeat(rng.random(6), 8))
    noisy = torch.from_numpy((exact * (1 + 3e-7 * rng.standard_normal(48))).astype(np.float32))[None]
    assert len(noisy.unique()) > 6
    merged = merge_ties(TorchOps(), noisy)[0].numpy()
    assert len(np.unique(merged)) == 6
    np.testing.assert_allclose(merged, exact / exact.sum(), rtol=TIE)
    np.testing.assert_array_equal(np.argsort(-merged, kind="stable"), np.argsort(-exact, kind="stable"))


def test_ties_are_far_finer_than_the_scores_of_a_picture_are_apart() -> None:
    exact = np.sort(leverage_scores(photo_like(0), 6))
    assert np.median(np.diff(np.log(exact))) > 50 * TIE


@RUNNERS
@pytest.mark.parametrize("name", ["maxmin", "dpp", "leverage-dpp"])
def test_rows_of_zeros_are_chosen_after_every_token(runner: Callable[..., Run], name: str) -> None:
    """Among scattered rows of zeros the tokens are chosen as if they were alone, and none is chosen twice."""
    features = photo_like(2, 40, 24)
    present = np.sort(np.random.default_rng(1).permutation(60)[:40])
    padded = np.zeros((60, 24), np.float32)
    padded[present] = features
    config = SelectorConfig(name=name, rank=5)
    for keep in (8, 40, 45):
        alone = runner(config, 40, 24, keep=min(keep, 40))(features[None])[0]
        scores = runner(config, 60, 24, keep=keep, padded=True)(padded[None])[0]
        kept = keep_indices(scores, keep)
        assert len(np.unique(scores[scores > 0])) == min(keep, int((scores > 0).sum()))
        assert set(present[keep_indices(alone, min(keep, 40))]) <= set(kept)
        np.testing.assert_array_equal(
            np.sort(kept[np.isin(kept, present)]), present[keep_indices(alone, min(keep, 40))]
        )


@pytest.mark.parametrize("grid", [(24, 24), (5, 9), (1, 7), (16, 3)])
def test_cells_divide_the_grid(grid: tuple[int, int]) -> None:
    for count in (1, 2, 3, 7):
        cells = cells_of(grid, count)
        assert len(cells) == grid[0] * grid[1] and set(cells) == set(range(count))
    sizes = np.bincount(cells_of((24, 24), 16))
    np.testing.assert_array_equal(sizes, 36)  # 4 x 4 squares of 6 x 6


@RUNNERS
def test_half_of_the_budget_is_spread_and_half_is_leverages(runner: Callable[..., Run]) -> None:
    features = photo_like(3)
    config = SelectorConfig(name="leverage-grid", rank=6)
    kept = keep_indices(runner(config)(features[None])[0], K)
    plain = runner(SelectorConfig(rank=6))(features[None])[0]
    cells = cells_of(GRID, cell_count(K))
    best = {int(np.flatnonzero(cells == cell)[plain[cells == cell].argmax()]) for cell in range(K // 2)}
    rest = [index for index in np.argsort(-plain, kind="stable") if index not in best][: K - K // 2]
    assert set(kept) == best | set(rest) and len(best) == K // 2
    same = runner(config)(np.ones((1, T, D), np.float32))[0]  # all equal: the first of each cell, no more
    assert (same > 1.5 * same.min()).sum() == K // 2
