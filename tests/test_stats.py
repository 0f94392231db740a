"""InputStats: sums over tokens, bounded against float64, and nothing that is not finite gets in."""

from __future__ import annotations

import pytest
import torch
from tolerances import dot_bound

from llmquant.errors import QuantizationError
from llmquant.stats import InputStats, PairStats

WIDTH = 24


def activations(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, WIDTH, generator=generator) * torch.linspace(0.1, 30, WIDTH)
    return x.to(dtype)


def of(*batches: torch.Tensor, dtype: torch.dtype = torch.float32) -> InputStats:
    stats = InputStats(WIDTH, dtype=dtype)
    for batch in batches:
        stats.add(batch)
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_hessian_is_the_sum_of_outer_products(dtype):
    batches = [activations(3, 50, seed=s, dtype=dtype) for s in range(3)]
    rows = torch.cat([b.reshape(-1, WIDTH) for b in batches]).double()
    stats = of(*batches)
    bound = dot_bound(torch.float32, rows.shape[0]) * (rows.abs().T @ rows.abs())
    assert bool(((stats.hessian.double() - rows.T @ rows).abs() <= bound).all())
    assert stats.hessian.dtype == torch.float32
    assert stats.tokens == 450


@pytest.mark.parametrize("width", [1, WIDTH, 255, 256, 257, 515], ids=str)
def test_a_hessian_of_integers_is_exact(width):
    x = torch.randint(-9, 10, (40, width), generator=torch.Generator().manual_seed(0)).float()
    stats = InputStats(width)
    stats.add(x[:30])
    stats.add(x[30:])
    assert torch.equal(stats.hessian, sum(torch.outer(row, row) for row in x))


def test_importance_and_mean_magnitude_are_per_token():
    x = activations(64).double()
    stats = of(x, dtype=torch.float64)
    torch.testing.assert_close(stats.importance, x.square().mean(0))
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))


def counted(windows: torch.Tensor, share: float) -> torch.Tensor:
    """Windows with as many copies of the first token as it counts for, by hand."""
    copies = int(share * windows.shape[1])
    return torch.cat([windows[:, :1].expand(-1, copies, -1), windows[:, 1:]], dim=1)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_first_token_that_counts_is_there_several_times(share):
    windows, original = activations(3, 16).double(), activations(3, 16, seed=1).double()
    stats = InputStats(WIDTH, dtype=torch.float64, first_token_share=share)
    stats.add(windows)
    torch.testing.assert_close(
        stats.hessian, of(counted(windows, share), dtype=torch.float64).hessian
    )
    torch.testing.assert_close(stats.mean_abs, of(windows, dtype=torch.float64).mean_abs)
    assert stats.tokens == 48
    pairs = PairStats(WIDTH, dtype=torch.float64, first_token_share=share)
    pairs.add_pair(windows, original)
    by_hand = PairStats(WIDTH, dtype=torch.float64)
    by_hand.add_pair(counted(windows, share), counted(original, share))
    torch.testing.assert_close(pairs.hessian, by_hand.hessian)
    torch.testing.assert_close(pairs.cross, by_hand.cross)


def test_a_first_token_counts_at_least_as_any_other():
    windows = activations(3, 16)
    for x, share in ((windows, 0.01), (windows.reshape(-1, WIDTH), 0.5), (windows, 0.0)):
        stats = InputStats(WIDTH, first_token_share=share)
        stats.add(x)
        assert torch.equal(stats.hessian, of(x).hessian)


def test_a_first_token_that_is_not_finite_is_dropped_all_the_same():
    windows = activations(2, 8)
    windows[0, 0, 3] = float("nan")
    stats = InputStats(WIDTH, first_token_share=0.5)
    stats.add(windows)
    assert bool(stats.hessian.isfinite().all())
    assert (stats.tokens, stats.dropped) == (15, 1)


def test_of_no_tokens_everything_is_zero():
    stats = InputStats(WIDTH)
    assert stats.tokens == 0
    for value in (stats.hessian, stats.importance, stats.mean_abs):
        assert not bool(value.any())


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small ones, so that every order of summation gives the same float32 number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-5, 6, (*shape, WIDTH), generator=generator).float()


def test_merging_equals_one_accumulator():
    first, second = (integers(30, seed=s) for s in (1, 2))
    second[3, 4] = torch.inf
    merged, together = of(first), of(first, second)
    merged.merge(of(second))
    for name in ("hessian", "importance", "mean_abs"):
        assert torch.equal(getattr(merged, name), getattr(together, name)), name
    assert (merged.tokens, merged.dropped) == (together.tokens, together.dropped) == (59, 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_rows_that_are_not_finite_are_counted_and_left_out(bad):
    x = integers(4, 10)
    spoiled = x.clone()
    spoiled[1, 2, 0] = spoiled[1, 2, 5] = spoiled[3, 9, WIDTH - 1] = bad
    keep = torch.ones(40, dtype=torch.bool)
    keep[[12, 39]] = False
    stats, clean = of(spoiled), of(x.reshape(40, WIDTH)[keep])
    assert (stats.tokens, stats.dropped) == (38, 2)
    assert torch.equal(stats.hessian, clean.hessian)
    assert torch.equal(stats.mean_abs, clean.mean_abs)


def test_a_value_beyond_fp16_is_no_trouble_in_float32():
    x = torch.full((2, WIDTH), 60000.0, dtype=torch.float16)
    assert bool(torch.isfinite(of(x).hessian).all())


def test_all_rows_lost_leaves_zero_tokens():
    stats = of(torch.full((5, WIDTH), torch.nan))
    assert (stats.tokens, stats.dropped) == (0, 5)


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda: InputStats(WIDTH).merge(InputStats(WIDTH + 1)), id="merge"),
        pytest.param(
            lambda: InputStats(WIDTH).add(torch.zeros(WIDTH, 2 * WIDTH)),
            id="add a multiple of the width",
        ),
    ],
)
def test_another_width_is_refused(act):
    with pytest.raises(QuantizationError, match=f"{WIDTH}"):
        act()


def pairs(x: torch.Tensor, original: torch.Tensor) -> PairStats:
    stats = PairStats(WIDTH)
    stats.add_pair(x, original)
    return stats


def test_pairs_remember_both_sides_the_right_way_round():
    x, original = activations(3, 40), activations(3, 40, seed=1)
    stats = pairs(x, original)
    assert torch.equal(stats.hessian, of(x).hessian)
    rows, beside = x.reshape(-1, WIDTH).double(), original.reshape(-1, WIDTH).double()
    bound = dot_bound(torch.float32, 120) * (beside.abs().T @ rows.abs())
    assert bool(((stats.cross.double() - beside.T @ rows).abs() <= bound).all())
    assert torch.equal(pairs(x, x).cross, pairs(x, x).hessian)


@pytest.mark.parametrize("side", [0, 1], ids=["quantized", "original"])
def test_a_row_that_is_not_finite_on_either_side_counts_for_neither(side):
    both = [integers(10), integers(10, seed=1)]
    whole = pairs(both[0][1:], both[1][1:])
    both[side][0, 3] = torch.nan
    stats = pairs(*both)
    assert (stats.tokens, stats.dropped) == (9, 1)
    assert torch.equal(stats.hessian, whole.hessian)
    assert torch.equal(stats.cross, whole.cross)


def test_merged_pairs_are_the_sum():
    first, second = (pairs(activations(8, seed=s), activations(8, seed=s + 10)) for s in (0, 1))
    cross = first.cross + second.cross
    first.merge(second)
    assert torch.equal(first.cross, cross)
    assert first.tokens == 16


def test_what_does_not_pair_up_is_refused():
    with pytest.raises(QuantizationError, match="do not pair up"):
        pairs(activations(4), activations(5))
    with pytest.raises(QuantizationError, match="merge only with statistics of pairs"):
        pairs(activations(4), activations(4)).merge(of(activations(4)))
