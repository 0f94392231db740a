"""Group parameters against scalar twins: min-max exactly, the search by its own measure."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slips import slipped
from twin import candidates, error_of, minmax_twin

from llmquant.algorithms import MINMAX, ScaleSearch, fit, round_to_codes
from llmquant.errors import SpecError
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.weight import eight_bits, is_portable

SPECS = pytest.mark.parametrize(
    "spec",
    [QuantSpec(b, g, s) for b in SUPPORTED_BITS for g in (8, None) for s in (True, False)],
    ids=str,
)
MODULE = sys.modules["llmquant.algorithms.scale_search"]
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def heavy_tailed(
    out: int, in_: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Weights with outliers, so that clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out, in_, generator=generator).pow(3) * 0.05).to(dtype)


def rounded(
    w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """``q(w)`` in groups ``[out, groups, width]``."""
    grouped = w.reshape(w.shape[0], -1, spec.width(w.shape[1]))
    scale, zero = scales.unsqueeze(-1), zeros.to(w.dtype).unsqueeze(-1)
    return (round_to_codes(grouped, scale, zero, spec.max_code) - zero) * scale


def errors(
    w: torch.Tensor,
    spec: QuantSpec,
    search: ScaleSearch,
    importance: torch.Tensor | None = None,
    fit: Callable[..., tuple[torch.Tensor, torch.Tensor]] = fit,
) -> torch.Tensor:
    """``[out, groups]`` in float64, by the search's own measure."""
    scales, zeros = fit(w, spec, search, importance)
    q = rounded(w.double(), scales.double(), zeros, spec)
    delta = (q - w.double().reshape(q.shape)).abs().pow(search.norm)
    return (
        delta if importance is None else delta * importance.double().reshape(1, -1, q.shape[-1])
    ).sum(-1)


def check_minmax(module, spec):
    """A module's min-max parameters are the scalar twin's."""
    w = heavy_tailed(6, 24, dtype=torch.float64)
    w[0] = w[0].abs() + 0.1
    scales, zeros = module.fit(w, spec, MINMAX)
    for row, groups in enumerate(w.reshape(6, -1, spec.width(24)).tolist()):
        for group, values in enumerate(groups):
            assert (float(scales[row, group]), int(zeros[row, group])) == minmax_twin(values, spec)


@SPECS
def test_min_max_equals_its_scalar_twin(spec):
    check_minmax(MODULE, spec)


def check_search(module, spec, norm):
    """A module's search finds the best of all its candidates."""
    search = ScaleSearch(steps=7, smallest=0.4, norm=norm)
    w = heavy_tailed(4, 24, seed=1, dtype=torch.float64)
    found = errors(w, spec, search, fit=module.fit)
    for row, groups in enumerate(w.reshape(4, -1, spec.width(24)).tolist()):
        for group, values in enumerate(groups):
            best = min(
                error_of(values, scale, zero, spec, norm)
                for scale, zero in candidates(values, spec, search)
            )
            assert float(found[row, group]) == pytest.approx(best, rel=1e-9, abs=1e-18)


@SPECS
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4], ids=lambda n: f"norm {n}")
def test_search_finds_the_best_of_all_its_candidates(spec, norm):
    check_search(MODULE, spec, norm)


def check_importance(module, spec):
    """A module's weighted search finds the best of all its candidates by the weighted measure."""
    search, importance = (
        ScaleSearch(steps=7, smallest=0.4),
        torch.logspace(-2, 2, 24, dtype=torch.float64),
    )
    w = heavy_tailed(4, 24, seed=1, dtype=torch.float64)
    found = errors(w, spec, search, importance, module.fit)
    width = spec.width(24)
    for row, groups in enumerate(w.reshape(4, -1, width).tolist()):
        for group, values in enumerate(groups):
            costs = importance[group * width : (group + 1) * width].tolist()
            best = min(
                sum(
                    cost * error_of([v], scale, zero, spec, 2.0)
                    for v, cost in zip(values, costs, strict=True)
                )
                for scale, zero in candidates(values, spec, search)
            )
            assert float(found[row, group]) == pytest.approx(best, rel=1e-9, abs=1e-18)


@SPECS
def test_a_weighted_search_finds_the_best_by_its_measure(spec):
    check_importance(MODULE, spec)


SLIPS = {
    "the last candidate instead of the best": (
        "better = error < best",
        "better = error < torch.inf",
    ),
    "the best error is never noted": ("best = torch.where(better, error, best)", "best = best + 0"),
    "the zero-point of another candidate": (
        "zero = torch.where(better, new_zero, zero)",
        "zero = zero + 0",
    ),
    "one sign only": ("yield -scale, middle", "yield scale, middle"),
    "the zero-point never moves up": ("(zero + 1).clamp(max=spec.max_code)", "zero"),
    "one-sided groups do not reach zero": ("w.amin(-1).clamp(max=0)", "w.amin(-1)"),
    "importance of the columns reversed": (
        "importance.to(weight.dtype)",
        "importance.to(weight.dtype).flip(0)",
    ),
    "importance left out": ("cost is None else delta.mul_(cost)", "True else delta"),
    "errors squared whatever the norm": (
        "delta.square_() if search.norm == 2.0",
        "delta.square_() if True",
    ),
    "a code too many": ("clamp_(0, max_code)", "clamp_(0, max_code + 1)"),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right, wrong, monkeypatch):
    module = slipped(monkeypatch, MODULE, right, wrong)
    with pytest.raises(AssertionError):  # noqa: PT012 - which of the checks tells is not said
        for spec in (QuantSpec(3, 8, True), QuantSpec(3, 8, False)):
            check_minmax(module, spec)
            check_search(module, spec, 1.0)
            check_importance(module, spec)


@st.composite
def groups_of_weights(draw: st.DrawFn) -> torch.Tensor:
    """Rows of any finite magnitudes, constant and all-zero ones included."""
    rows = draw(st.integers(1, 3))
    kind = st.one_of(
        st.floats(-1e4, 1e4, width=32), st.floats(-(2.0**-10), 2.0**-10, width=32), st.just(0.0)
    )
    row = st.one_of(st.lists(kind, min_size=16, max_size=16), kind.map(lambda v: [v] * 16))
    return torch.tensor([draw(row) for _ in range(rows)], dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    groups_of_weights(),
    st.sampled_from(SUPPORTED_BITS),
    st.booleans(),
    st.sampled_from([None, 4]),
    st.sampled_from([1.0, 2.0]),
)
def test_search_is_never_worse_than_min_max_and_portable_where_fp16_has_room(
    w, bits, symmetric, group_size, norm
):
    spec, search = QuantSpec(bits, group_size, symmetric), ScaleSearch(steps=6, norm=norm)
    scales, zeros = fit(w, spec, search)
    assert torch.equal(eight_bits(scales), scales)
    roomy = bool((scales.abs() >= 2.0**-17).all())
    assert not roomy or is_portable(scales)
    assert zeros.dtype == torch.uint8
    assert int(zeros.max()) <= spec.max_code
    assert not symmetric or bool((zeros == spec.middle).all())
    # The search compares in float32, this check in float64: allow the float32 roundings of 16
    # additions.
    searched = errors(w, spec, search)
    plain = ScaleSearch(steps=0, norm=norm)
    minmax = errors(w, spec, plain)
    # Below fp16's eight bits, what either finds is rounded to what fp16 has, and after that the
    # search's may be the worse one. Its own scale can be that bound itself, rounded up to it.
    roomy = roomy and bool((fit(w, spec, plain)[0].abs() >= 2.0**-17).all())
    assert not roomy or bool((searched <= minmax * (1 + 1e-5) + 1e-30).all())


@SPECS
def test_search_beats_min_max_on_heavy_tails(spec):
    w = heavy_tailed(64, 64, seed=2)
    searched, minmax = errors(w, spec, ScaleSearch()).sum(), errors(w, spec, MINMAX).sum()
    assert float(searched) < 0.999 * float(minmax)


@pytest.mark.parametrize("group_size", [8, 16, None], ids=["g8", "g16", "per row"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS, ids=lambda b: f"{b} bits")
def test_asymmetric_min_max_is_within_half_a_step_inside_its_range(bits, group_size):
    spec = QuantSpec(bits, group_size, False)
    w = heavy_tailed(32, 48, seed=3, dtype=torch.float64)
    scales, zeros = fit(w, spec, MINMAX)
    grouped, scale, zero = (
        w.reshape(32, -1, spec.width(48)),
        scales.unsqueeze(-1),
        zeros.double().unsqueeze(-1),
    )
    low, high = -zero * scale, (spec.max_code - zero) * scale
    inside = (grouped >= low - scale / 2) & (grouped <= high + scale / 2)
    error = (rounded(w, scales, zeros, spec) - grouped).abs()
    assert bool((error <= scale / 2 * (1 + 1e-12))[inside].all())
    # An extreme can lie outside by what rounding took: the zero-point half a step, the scale 2**-8
    # of each of its steps.
    assert bool((error <= scale * (0.5 + spec.max_code * 2.0**-8)).all())


@SYMMETRY
def test_zero_stays_zero(symmetric):
    w = heavy_tailed(8, 32)
    w[:, ::5] = 0
    w[3] = 0
    spec = QuantSpec(4, 16, symmetric)
    q = rounded(w, *fit(w, spec, ScaleSearch()), spec).reshape(w.shape)
    assert not bool(q[w == 0].any())


@pytest.mark.parametrize(
    ("sign", "zero"),
    [pytest.param(1, 0, id="all positive"), pytest.param(-1, 15, id="all negative")],
)
def test_a_one_sided_group_spends_every_code_on_its_side(sign, zero):
    w = sign * torch.linspace(0.5, 7.5, 16).reshape(1, 16)
    scales, zeros = fit(w, QuantSpec(4, None, False), MINMAX)
    assert float(scales) == 0.5
    assert int(zeros) == zero


@pytest.mark.parametrize(
    ("longest", "scale"),
    [pytest.param(8.0, -1.0, id="outlier above"), pytest.param(-8.0, 1.0, id="outlier below")],
)
def test_a_negative_scale_puts_the_long_side_where_the_outlier_is(longest, scale):
    w = torch.tensor([[longest, -longest * 7 / 8, 1.0, -3.0, 5.0, 0.0, 2.0, -6.0]])
    scales, zeros = fit(w, QuantSpec(4, None, True), ScaleSearch())
    assert float(scales) == scale
    assert torch.equal(rounded(w, scales, zeros, QuantSpec(4, None, True)).reshape(w.shape), w)


@SYMMETRY
def test_importance_buys_precision_where_it_matters(symmetric):
    spec, w = QuantSpec(3, None, symmetric), heavy_tailed(64, 32, seed=4)
    importance = torch.ones(32)
    importance[:4] = 1000
    plain, weighed = (
        (rounded(w, *fit(w, spec, ScaleSearch(), i), spec).reshape(w.shape) - w).square()
        for i in (None, importance)
    )
    assert float(weighed[:, :4].sum()) < 0.8 * float(plain[:, :4].sum())
    assert float(weighed.sum()) > float(plain.sum())


@SYMMETRY
def test_equal_importance_changes_nothing(symmetric):
    w, spec = heavy_tailed(16, 32), QuantSpec(4, 16, symmetric)
    for plain, weighed in zip(
        fit(w, spec, ScaleSearch()),
        fit(w, spec, ScaleSearch(), torch.full((32,), 2.0)),
        strict=True,
    ):
        assert torch.equal(plain, weighed)


@SYMMETRY
def test_a_norm_is_best_by_its_own_measure(symmetric):
    w, spec = heavy_tailed(32, 64, seed=5), QuantSpec(3, None, symmetric)
    chosen = {
        norm: rounded(w, *fit(w, spec, ScaleSearch(norm=norm)), spec).reshape(w.shape)
        for norm in (1.0, 2.0, 4.0)
    }
    for judge in chosen:
        scores = {norm: float((q - w).abs().pow(judge).sum()) for norm, q in chosen.items()}
        assert min(scores, key=scores.__getitem__) == judge


@SPECS
@pytest.mark.parametrize("elements", [1, 100, 24 * 7, 1 << 24], ids=lambda n: f"{n} elements")
def test_slicing_by_rows_changes_nothing(monkeypatch, spec, elements):
    w = heavy_tailed(33, 24, seed=6)
    importance = torch.rand(24, generator=torch.Generator().manual_seed(0))
    whole = fit(w, spec, ScaleSearch(steps=9), importance)
    monkeypatch.setattr(
        sys.modules["llmquant.algorithms.scale_search"], "_SLICE_ELEMENTS", elements
    )
    sliced = fit(w, spec, ScaleSearch(steps=9), importance)
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])


def test_a_group_of_a_row_is_fitted_as_if_it_stood_alone():
    w, spec = heavy_tailed(8, 32), QuantSpec(4, 8, False)
    scales, zeros = fit(w, spec, ScaleSearch())
    for group in range(4):
        alone = fit(w[:, group * 8 : group * 8 + 8], QuantSpec(4, None, False), ScaleSearch())
        assert torch.equal(scales[:, group : group + 1], alone[0])
        assert torch.equal(zeros[:, group : group + 1], alone[1])


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"steps": -1}, id="negative steps"),
        pytest.param({"smallest": 0.0}, id="empty range"),
        pytest.param({"smallest": 1.5}, id="wider than min-max"),
        pytest.param({"norm": 0.0}, id="norm 0"),
    ],
)
def test_an_impossible_search_is_refused(fields):
    with pytest.raises(SpecError, match="scale search needs"):
        ScaleSearch(**fields)
