"""AWQ's search against plain loops in float64, and what it promises by its own measure."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from slips import slipped

from llmquant.algorithms import AWQOptions, ScaleSearch, rtn, search_scale
from llmquant.algorithms.awq import candidates, loss_of
from llmquant.errors import QuantizationError, SpecError
from llmquant.spec import QuantSpec

SPEC = QuantSpec(3, 4, False)
SEARCH, WEIGHTED = ScaleSearch(steps=4), ScaleSearch(steps=4, weighted=True)
MODULE = sys.modules["llmquant.algorithms.awq"]


def case(seed: int = 0, out: int = 6, width: int = 8) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two weights and inputs ``[tokens, width]`` of which two channels are far larger than the
    others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, width, generator=generator, dtype=torch.float64)
    x[:, 1] *= 12
    x[:, 6] *= 5
    return [torch.randn(out, width, generator=generator, dtype=torch.float64) for _ in range(2)], x


def loss_twin(
    weights: list[torch.Tensor], x: torch.Tensor, scale: list[float], search: ScaleSearch
) -> float:
    """The squared difference of the outputs, token by token and row by row."""
    total = 0.0
    seen = torch.tensor(
        [sum((float(token[j]) / scale[j]) ** 2 for token in x) for j in range(x.shape[1])],
        dtype=torch.float64,
    )
    for w in weights:
        scaled = torch.stack([w[:, j] * scale[j] for j in range(w.shape[1])], 1)
        q = rtn(scaled, SPEC, search, seen).dequantize(torch.float64)
        for token in x:
            for row in range(w.shape[0]):
                got = sum(float(q[row, j]) * float(token[j]) / scale[j] for j in range(w.shape[1]))
                want = sum(float(w[row, j]) * float(token[j]) for j in range(w.shape[1]))
                total += (got - want) ** 2
    return total


def scale_twin(
    weights: list[torch.Tensor], x: torch.Tensor, ratio: float, duo: bool, channel: list[int]
) -> list[float]:
    columns = range(x.shape[1])
    activity = [float(x[:, j].abs().mean()) for j in columns]
    magnitude = []
    for j in columns:
        group = slice(j // 4 * 4, j // 4 * 4 + 4)
        relative = [
            float(row[j].abs() / (row[group].abs().max() + 1e-6)) for w in weights for row in w
        ]
        magnitude.append(sum(relative) / len(relative))
    scales = []
    for shared in range(max(channel) + 1):
        inside = [j for j in columns if channel[j] == shared]
        a = sum(activity[j] for j in inside) / len(inside)
        b = sum(magnitude[j] for j in inside) / len(inside)
        scales.append(max(a**ratio / (b ** (1 - ratio) + 1e-4 if duo else 1.0), 1e-4))
    middle = (max(scales) * min(scales)) ** 0.5
    return [s / middle for s in scales]


def check(module, duo, steps, channel, search=SEARCH):
    """The search of a module is that of plain loops."""
    weights, x = case()
    options = module.AWQOptions(grid=5, duo_scaling=duo, steps=steps)
    found = module.search_scale(
        weights, [SPEC, SPEC], x.T @ x, x.abs().mean(0), search, options, torch.tensor(channel)
    )
    tried = []
    for kind in {"both": (False, True), "on": (True,), "off": (False,)}[duo]:
        for step in range(0 if kind else 1, 6):
            scale = scale_twin(weights, x, step / 5, kind, channel)
            loss = loss_twin(
                weights, x, [scale[c] for c in channel], replace(search, steps=min(steps, 4))
            )
            tried.append((loss, step / 5, kind, scale))
    _, ratio, kind, scale = min(tried, key=lambda t: t[0])
    signal = sum(float((x @ w.T).square().sum()) for w in weights)
    before = loss_twin(weights, x, [1.0] * 8, search) / signal
    after = loss_twin(weights, x, [scale[c] for c in channel], search) / signal
    assert found.before == pytest.approx(before, rel=1e-9)
    if after >= before:
        ratio, kind, scale, after = None, False, [1.0] * len(scale), before
    assert (found.ratio, found.duo) == (ratio, kind)
    assert found.after == pytest.approx(after, rel=1e-9)
    assert found.scale.tolist() == pytest.approx(scale, rel=1e-9)


def check_gain(module, seed):
    """Where no scale helps, nothing is scaled."""
    weights, _ = case(seed)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = module.search_scale(
        weights, [SPEC, SPEC], x.T @ x, x.abs().mean(0), SEARCH, AWQOptions(grid=3)
    )
    assert found.after <= found.before
    assert (found.ratio is None) == bool((found.scale == 1).all())


@pytest.mark.parametrize(
    "channel", [list(range(8)), [0, 1, 2, 3, 0, 1, 2, 3]], ids=["own scales", "shared by two"]
)
@pytest.mark.parametrize(
    "steps", [2, 16], ids=["coarser than the recipe's", "never finer than the recipe's"]
)
@pytest.mark.parametrize("duo", ["off", "on", "both"])
@pytest.mark.parametrize("search", [SEARCH, WEIGHTED], ids=["plain", "weighted"])
def test_the_search_equals_plain_loops(search, duo, steps, channel):
    check(MODULE, duo, steps, channel, search)


SLIPS = {
    "weights divided": ("rtn(w * scale,", "rtn(w / scale,"),
    "the rounded weight is not scaled back": ("rounded / scale - w", "rounded - w"),
    "channels taken as independent": (
        "(delta @ hessian) * delta",
        "delta * hessian.diagonal() * delta",
    ),
    "importance of the unscaled inputs": ("importance / scale.square()", "importance"),
    "importance scaled the wrong way": (
        "importance / scale.square()",
        "importance * scale.square()",
    ),
    "exponents swapped": ("magnitude.pow(1 - ratio)", "magnitude.pow(ratio)"),
    "magnitudes relative to the whole weight": (".amax(-1, keepdim=True)", ".amax()"),
    "magnitudes of the first linear only": ("torch.cat(rows)", "rows[0]"),
    "the last candidate instead of the best": ("if loss < best:", "if True:"),
    "no scaling measured by the coarse search": ("ones[own], search)", "ones[own], cheap)"),
    "a loser is folded": ("or not after < before", ""),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right, wrong, monkeypatch):
    module = slipped(monkeypatch, MODULE, right, wrong)
    with pytest.raises(AssertionError):  # noqa: PT012 - which of the cases tells is not said
        for search in (SEARCH, WEIGHTED):
            for duo in ("off", "both"):
                check(module, duo, 2, list(range(8)), search)
        for seed in range(8):
            check_gain(module, seed)


def test_a_scale_on_the_wrong_side_loses():
    weights, x = case()
    hessian, ones = x.T @ x, torch.ones(8, dtype=torch.float64)
    found = search_scale(weights, [SPEC, SPEC], hessian, x.abs().mean(0), SEARCH, AWQOptions())
    assert found.after < 0.9 * found.before
    losses = [
        loss_of(weights, [SPEC, SPEC], hessian, hessian.diagonal(), s, SEARCH)
        for s in (found.scale, ones, 1 / found.scale)
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("seed", range(8))
def test_the_result_is_never_worse_than_no_scaling(seed):
    check_gain(MODULE, seed)


def test_a_channel_that_was_never_seen_gets_a_middling_scale():
    weights, x = case()
    x[:, 3] = 0
    for _, _, scale in candidates(
        weights, [SPEC, SPEC], x.abs().mean(0), torch.arange(8), AWQOptions(grid=4)
    ):
        assert bool(torch.isfinite(scale).all())
        assert float(scale.max() * scale.min()) == pytest.approx(1)
        assert scale.min() <= scale[3] <= scale.max()


def test_statistics_that_overflowed_are_refused():
    weights, x = case()
    with pytest.raises(QuantizationError, match=r"o_proj: its calibration statistics overflowed"):
        search_scale(
            weights,
            [SPEC, SPEC],
            x.T @ x * float("inf"),
            x.abs().mean(0),
            SEARCH,
            AWQOptions(),
            module="o_proj",
        )


@pytest.mark.parametrize("options", [{"grid": 0}, {"steps": -1}, {"duo_scaling": "maybe"}], ids=str)
def test_impossible_options_are_refused(options):
    with pytest.raises(SpecError, match="AWQ needs grid >= 1"):
        AWQOptions(**options)
