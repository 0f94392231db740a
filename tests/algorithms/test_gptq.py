"""GPTQ is the one-column loop: equal codes in float64 for every order, grouping and block size, and
slips do not pass.

"Better than round-to-nearest" would not do: several of the slips planted at the end still beat it.
"""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from slips import slipped
from tolerances import TWIN_ATOL
from twin import TwinResult, gptq_twin

from llmquant.algorithms import (
    MINMAX,
    GPTQOptions,
    ScaleSearch,
    factorize,
    gptq,
    layer_error,
    round_to_codes,
    rtn,
)
from llmquant.errors import QuantizationError, SpecError
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.weight import QuantizedWeight

OUT, IN = 6, 48
DEAD = (5, 30)


def inputs(rows: int = 160, seed: int = 0) -> torch.Tensor:
    """Correlated float64 activations of very different magnitudes, two channels of which are always
    zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64) * 0.4 + torch.eye(
        IN, dtype=torch.float64
    )
    x = torch.randn(rows, IN, generator=generator, dtype=torch.float64) @ mix
    x *= torch.logspace(-1, 1, IN, dtype=torch.float64)[torch.randperm(IN, generator=generator)]
    x[:, list(DEAD)] = 0
    return x


def weight(seed: int = 1) -> torch.Tensor:
    return (
        torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * 0.1
    )


HESSIAN = inputs().T @ inputs()
SEARCH = ScaleSearch(steps=4)
WEIGHTED = ScaleSearch(steps=4, weighted=True)


def cases() -> dict[str, tuple[QuantSpec, GPTQOptions]]:
    """Bits, symmetry, order, grouping and block size; the block is never a multiple of everything
    at once."""
    found = {}
    for bits, symmetric, order in itertools.product(
        SUPPORTED_BITS, (True, False), ("static", "off", "group")
    ):
        for group, block in ((8, 20), (16, 7), (24, 128), (None, 13)):
            if order == "group" and group is None:
                continue
            spec = QuantSpec(bits, group, symmetric)
            found[f"{spec} {order} block {block}"] = (spec, GPTQOptions(block, 0.01, order, SEARCH))
    for order in ("static", "off", "group"):
        for block in (1, 5, 16, 47, 48, 49):
            spec = QuantSpec(4, 16, False)
            found[f"{spec} {order} block {block}"] = (spec, GPTQOptions(block, 0.01, order, MINMAX))
        found[f"W3 g12 {order} weighted"] = (
            QuantSpec(3, 12, False),
            GPTQOptions(18, 0.05, order, WEIGHTED),
        )
        found[f"W4 g1 {order}"] = (QuantSpec(4, 1, False), GPTQOptions(10, 0.01, order, MINMAX))
        found[f"W2 g48 {order} is per row"] = (
            QuantSpec(2, 48, True),
            GPTQOptions(11, 0.01, order, SEARCH),
        )
    return found


CASES = cases()


def run(module: types.ModuleType, spec: QuantSpec, options: GPTQOptions) -> QuantizedWeight:
    """GPTQ as ``module`` implements it, in float64."""
    return module.gptq(weight(), module.factorize(HESSIAN, options), spec, options)


def same(result: QuantizedWeight, twin: TwinResult) -> bool:
    """Equal codes and groups, and dequantized numbers within the twin tolerance."""
    return (
        torch.equal(result.codes.double(), twin.codes)
        and torch.equal(result.column_groups(), twin.group_of)
        and float((result.dequantize(torch.float64) - twin.dequantized).abs().max()) <= TWIN_ATOL
    )


GPTQ_MODULE = sys.modules["llmquant.algorithms.gptq"]


@pytest.mark.parametrize(("spec", "options"), CASES.values(), ids=CASES)
def test_blocked_gptq_equals_the_one_column_loop(spec, options):
    result, twin = run(GPTQ_MODULE, spec, options), gptq_twin(weight(), HESSIAN, spec, options)
    assert torch.equal(result.codes.double(), twin.codes)
    assert torch.equal(result.column_groups(), twin.group_of)
    torch.testing.assert_close(
        result.dequantize(torch.float64), twin.dequantized, rtol=0, atol=TWIN_ATOL
    )
    assert (result.g_idx is not None) == (options.act_order == "group")


def test_the_cases_tell_the_orders_and_rtn_apart():
    spec = QuantSpec(4, 16, False)
    results = {
        o: run(GPTQ_MODULE, spec, GPTQOptions(7, act_order=o, search=MINMAX)).digest()
        for o in ("static", "off", "group")
    }
    assert len({*results.values(), rtn(weight(), spec, MINMAX).digest()}) == 4


SLIPS = {
    "block-local column used as a global one to look up the group": (
        "scale, zero = scales[groups[column]]",
        "scale, zero = scales[groups[column - start]]",
    ),
    "columns behind the block never hear of its errors": (
        "w[stop:].addmm_(",
        "w[stop:].clone().addmm_(",
    ),
    "only the block's last error reaches the columns behind it": (
        "w[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)",
        "w[stop:].addmm_(factor.upper[stop - 1 : stop, stop:].T, errors[-1:], alpha=-1)",
    ),
    "columns inside the block are not updated": (
        "w[column + 1 : stop].addr_(",
        "w[column + 1 : stop].clone().addr_(",
    ),
    "the last column of a block is not updated": (
        "w[column + 1 : stop].addr_(row[column + 1 - start :]",
        "w[column + 1 : stop - 1].addr_(row[column + 1 - start : -1]",
    ),
    "error not divided by the diagonal": (" / row[column - start]", ""),
    "error of the code, not of the value": ("(code - zero) * scale) / r", "code * scale) / r"),
    "a late group is fitted on others' columns": (
        "_fit_group(w, first, grid",
        "_fit_group(w.roll(1, 0), first, grid",
    ),
    "late groups are fitted on the original weights": (
        'if options.act_order == "static":',
        "if True:",
    ),
    "codes left in visiting order": ("natural[factor.order] = codes", "natural[:] = codes"),
    "g_idx left in visiting order": (
        "g_idx[factor.order] = grid.group_of",
        "g_idx[:] = grid.group_of",
    ),
    "Hessian left in natural order": ("hessian[order][:, order]", "hessian.clone()"),
    "groups of visited columns in natural numbering": (
        "factor.order // width, scales",
        "visited // width, scales",
    ),
    "no damping": ("damping * mean)", "0 * mean + 1e-12)"),
    "damping relative to the largest diagonal": ("mean = diagonal.mean()", "mean = diagonal.max()"),
    "columns visited by rising importance": ("descending=True", "descending=False"),
    "lower triangle of the inverse's factor": (
        "return upper if all_finite",
        "return upper.T.contiguous() if all_finite",
    ),
    "importance in the wrong order": (
        "factor.importance[factor.order[columns]]",
        "factor.importance[columns]",
    ),
}


@pytest.fixture(scope="module")
def twins() -> Callable[[str], TwinResult]:
    """The twin's result of a case, computed once."""
    known: dict[str, TwinResult] = {}

    def of(name: str) -> TwinResult:
        if name not in known:
            known[name] = gptq_twin(weight(), HESSIAN, *CASES[name])
        return known[name]

    return of


@pytest.mark.parametrize(("old", "new"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_does_not_pass(monkeypatch, twins, old, new):
    module = slipped(monkeypatch, GPTQ_MODULE, old, new)
    few = [name for name in CASES if name.startswith(("W4 g16 asym", "W3 g12", "W2 g8 sym"))]
    assert any(not same(run(module, *CASES[name]), twins(name)) for name in few)


def test_the_source_unchanged_passes_the_same_cases(monkeypatch, twins):
    module = slipped(monkeypatch, GPTQ_MODULE, "import torch\n", "import torch\n\n")
    for name in [name for name in CASES if name.startswith(("W4 g16 asym", "W3 g12", "W2 g8 sym"))]:
        assert same(run(module, *CASES[name]), twins(name)), name


@pytest.mark.parametrize("order", ["static", "off"])
def test_the_factor_is_the_triangle_of_the_damped_inverse(order):
    factor = factorize(HESSIAN, GPTQOptions(damping=0.05, act_order=order))
    damped = HESSIAN + 0.05 * HESSIAN.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)[factor.order][:, factor.order]
    torch.testing.assert_close(factor.upper.T @ factor.upper, inverse, rtol=1e-9, atol=1e-12)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.equal(factor.importance, HESSIAN.diagonal())
    importance = factor.importance[factor.order]
    assert (
        torch.equal(factor.order, torch.arange(IN))
        if order == "off"
        else bool((importance.diff() <= 0).all())
    )


def test_equally_important_columns_keep_their_order():
    factor = factorize(torch.eye(8), GPTQOptions())
    assert factor.order.tolist() == list(range(8))


# Eigenvalues 1 ± 1.05: damping 0.01 leaves -0.04, damping 0.1 gives +0.05.
SLIGHTLY_INDEFINITE = torch.tensor([[1.0, 1.05], [1.05, 1.0]])


def rank_one_in_float32(n: int = 256) -> torch.Tensor:
    """``X^T X`` of one token seen many times: singular, and float32's roundings make it
    indefinite."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 100
    return torch.outer(x, x)


@pytest.mark.parametrize(
    ("hessian", "asked", "used"),
    [
        pytest.param(torch.eye(4), 0.01, 0.01, id="definite: as asked"),
        pytest.param(SLIGHTLY_INDEFINITE, 0.01, 0.1, id="indefinite: ten times"),
        pytest.param(SLIGHTLY_INDEFINITE, 0.2, 0.2, id="indefinite but damped enough"),
        pytest.param(torch.tensor([[1.0, 1.5], [1.5, 1.0]]), 0.03, 1.0, id="never beyond 1"),
    ],
)
def test_damping_rises_while_cholesky_fails_and_is_reported(hessian, asked, used):
    factor = factorize(hessian, GPTQOptions(damping=asked, act_order="off"))
    assert math.isclose(factor.damping, used)
    damped = hessian + factor.damping * torch.eye(hessian.shape[0]) * hessian.diagonal().mean()
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))


def test_a_singular_float32_hessian_is_damped_until_it_factorizes():
    factor = factorize(rank_one_in_float32(), GPTQOptions(damping=1e-9))
    assert 1e-9 < factor.damping < 1e-3
    assert bool(torch.isfinite(factor.upper).all())


NO_FACTOR = {
    "far from definite": (
        torch.tensor([[1.0, 3.0], [3.0, 1.0]]),
        "not positive definite even at damping 1$",
    ),
    "zero": (torch.zeros(4, 4), "inputs were zero for every calibration token"),
    "NaN": (torch.full((4, 4), torch.nan), "calibration statistics overflowed"),
    "overflow": (torch.eye(4) * torch.inf, "calibration statistics overflowed"),
}


@pytest.mark.parametrize(("hessian", "told"), NO_FACTOR.values(), ids=NO_FACTOR)
def test_a_hopeless_hessian_is_an_error_that_names_the_module(hessian, told):
    with pytest.raises(QuantizationError, match=told) as caught:
        factorize(hessian, GPTQOptions(), "model.layers.1.mlp.down_proj")
    assert str(caught.value).startswith("model.layers.1.mlp.down_proj: ")


def dead_codes(result: QuantizedWeight) -> torch.Tensor:
    return result.codes[:, list(DEAD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["static", "off", "group"])
def test_dead_columns_are_counted_and_rounded_to_nearest(order, dtype):
    options, spec = GPTQOptions(7, act_order=order, search=SEARCH), QuantSpec(4, 16, False)
    w, hessian = weight().to(dtype), HESSIAN.to(dtype)
    factor = factorize(hessian, options)
    assert factor.dead == len(DEAD)
    result = gptq(w, factor, spec, options)
    group = result.column_groups()[list(DEAD)]
    scale, zero = result.scales.to(dtype)[:, group], result.zeros.to(dtype)[:, group]
    nearest = round_to_codes(w[:, list(DEAD)], scale, zero, spec.max_code)
    assert torch.equal(dead_codes(result).to(dtype), nearest)
    if order == "static":
        assert torch.equal(dead_codes(result), dead_codes(rtn(w, spec, SEARCH)))


def test_static_order_uses_exactly_the_parameters_of_rtn():
    options, spec = GPTQOptions(search=SEARCH), QuantSpec(3, 8, False)
    result, nearest = run(GPTQ_MODULE, spec, options), rtn(weight(), spec, SEARCH)
    assert torch.equal(result.scales, nearest.scales)
    assert torch.equal(result.zeros, nearest.zeros)


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    diagonal = torch.diag(torch.linspace(1, 5, IN, dtype=torch.float64))
    for order in ("static", "off"):
        options = GPTQOptions(9, act_order=order, search=SEARCH)
        for spec in (QuantSpec(4, 16, True), QuantSpec(3, None, False)):
            assert (
                gptq(weight(), factorize(diagonal, options), spec, options).digest()
                == rtn(weight(), spec, SEARCH).digest()
            )


@pytest.mark.parametrize("block", [1, 7, 20, 64], ids=lambda b: f"block {b}")
def test_in_float32_the_block_size_moves_the_output_error_by_at_most_a_percent(block):
    spec, options = QuantSpec(4, 16, False), GPTQOptions(block, search=SEARCH)
    hessian, w = HESSIAN.float(), weight().float()
    error = layer_error(
        w, gptq(w, factorize(hessian, options), spec, options).dequantize(), hessian
    )
    exact = layer_error(weight(), gptq_twin(weight(), HESSIAN, spec, options).dequantized, HESSIAN)
    assert error == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
def test_output_error_is_at_most_two_thirds_of_round_to_nearest(bits):
    spec, options = QuantSpec(bits, 16, False), GPTQOptions(search=SEARCH)
    ours = layer_error(weight(), run(GPTQ_MODULE, spec, options).dequantize(), HESSIAN)
    assert ours <= 2 / 3 * layer_error(weight(), rtn(weight(), spec, SEARCH).dequantize(), HESSIAN)


def test_layer_error_is_the_relative_error_of_the_outputs():
    x, w, q = inputs(), weight(), rtn(weight(), QuantSpec(4, 16)).dequantize(torch.float64)
    outputs = x @ w.T
    expected = float((x @ (w - q).T).square().sum() / outputs.square().sum())
    assert layer_error(w, q, HESSIAN) == pytest.approx(expected, rel=1e-9)
    assert layer_error(w, w, HESSIAN) == 0
    assert layer_error(w, q, torch.zeros_like(HESSIAN)) == 0


def test_the_same_twice_and_the_weight_left_alone():
    w = weight().float()
    before = w.clone()
    options = GPTQOptions(7)
    factor = factorize(HESSIAN.float(), options)
    upper = factor.upper.clone()
    first, second = (gptq(w, factor, QuantSpec(4, 8), options) for _ in range(2))
    assert first.digest() == second.digest()
    assert torch.equal(w, before)
    assert torch.equal(factor.upper, upper)


def test_a_weight_that_is_not_finite_names_its_module():
    w = weight()
    w[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"^block\.q_proj: .* 1 NaN or Inf"):
        gptq(w, factorize(HESSIAN, GPTQOptions()), QuantSpec(4, 8), GPTQOptions(), "block.q_proj")


@pytest.mark.parametrize(
    ("spec", "options", "told"),
    [
        pytest.param(
            QuantSpec(4, 7),
            GPTQOptions(),
            r"^m: group_size=7 does not divide its 48",
            id="odd group size",
        ),
        pytest.param(
            QuantSpec(4, None),
            GPTQOptions(act_order="group"),
            "^m: act_order group needs",
            id="group per row",
        ),
    ],
)
def test_an_impossible_request_names_the_module(spec, options, told):
    with pytest.raises(SpecError, match=told):
        gptq(weight(), factorize(HESSIAN, options), spec, options, "m")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"block_size": 0}, id="no columns in a block"),
        pytest.param({"damping": 0.0}, id="no damping"),
        pytest.param({"damping": 1.5}, id="damping above 1"),
        pytest.param({"act_order": "desc"}, id="unknown order"),
    ],
)
def test_impossible_options_are_refused(fields):
    with pytest.raises(SpecError):
        GPTQOptions(**fields)
