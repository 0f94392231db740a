"""The compiled scale search and GPTQ loop against the torch code that defines them: equal bits,
every instruction set."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from llmquant.algorithms import GPTQOptions, ScaleSearch, factorize, fit, gptq, native
from llmquant.algorithms.scale_search import _folded
from llmquant.runtime import native_library
from llmquant.runtime.processor import this_processor
from llmquant.spec import SUPPORTED_BITS, QuantSpec

GPTQ = sys.modules["llmquant.algorithms.gptq"]
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
BITS = pytest.mark.parametrize("bits", SUPPORTED_BITS, ids=lambda b: f"{b} bits")
# torch's addr_ rounds once where there is fused multiply-add, as the compiled loop does everywhere.
FUSED = pytest.mark.skipif(
    this_processor().is_x86 and not this_processor().has("avx2", "fma"),
    reason="torch rounds twice without fused multiply-add",
)


@pytest.fixture(params=list(native_library.compiled_instructions()))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, in turn."""
    with native_library.instructions(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_torch(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., object], *args: object
) -> object:
    """What ``function`` gives without compiled code."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "why_not", lambda weight: "the test wants torch")
        return function(*args)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).pow(3) * 0.05


def test_float32_on_the_cpu_is_compiled():
    assert native.why_not(torch.ones(1, 1)) is None
    assert "float64" in (native.why_not(torch.ones(1, 1, dtype=torch.float64)) or "")
    assert "meta" in (native.why_not(torch.ones(1, 1, device="meta")) or "")


def test_without_the_library_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(native_library, "library", lambda: None)
    assert "install g++" in (native.why_not(torch.ones(1, 1)) or "")


@BITS
@SYMMETRY
@pytest.mark.parametrize("steps", [0, 1, 4, 48], ids=lambda n: f"{n} steps")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_search_is_torchs_to_the_bit(
    monkeypatch, instruction_set, bits, symmetric, steps, weighted
):
    for width in (1, 3, 8, 17, 24, 32, 33, 36, 61, 64, 68, 100, 128, 257, 1536):
        w = weights(5, 2 * width, seed=width)
        cost = (
            torch.rand(2 * width, generator=torch.Generator().manual_seed(1)) if weighted else None
        )
        arguments = (w, QuantSpec(bits, width, symmetric), ScaleSearch(steps=steps), cost)
        assert same(fit(*arguments), in_torch(monkeypatch, fit, *arguments)), width


ODD = {
    "zero": torch.zeros(4, 64),
    "negative zero": -torch.zeros(4, 64),
    "positive": weights(4, 64).abs(),
    "negative": -weights(4, 64).abs(),
    "constant": torch.full((4, 64), 0.3),
    "a zero group among others": weights(4, 64).index_fill(1, torch.arange(32), 0.0),
    "one outlier": torch.cat([torch.full((4, 1), 30.0), weights(4, 63)], 1),
    "ties": torch.arange(-32, 32).repeat(4, 1) / 4,
    "below fp16's smallest scale": weights(4, 64) * 2**-12,
    "subnormal": weights(4, 64) * 2**-130,
    "at fp16's largest scale": weights(4, 64).sign() * 65504 * 7,
    "beyond fp16's largest scale": weights(4, 64) * 1e9,
    "squares that overflow": weights(4, 64) * 1e25,
    "float32's limits": weights(4, 64).sign() * torch.finfo(torch.float32).max,
}


@BITS
@SYMMETRY
@pytest.mark.parametrize("w", ODD.values(), ids=ODD)
def test_odd_groups_are_torchs_to_the_bit(monkeypatch, instruction_set, bits, symmetric, w):
    for group_size in (8, 32, None):
        arguments = (w, QuantSpec(bits, group_size, symmetric), ScaleSearch())
        assert same(fit(*arguments), in_torch(monkeypatch, fit, *arguments))


@SYMMETRY
def test_no_error_is_above_the_best_candidates_by_more_than_rounding(instruction_set, symmetric):
    """Independent of the torch twin in float32: judged in float64, against the search in
    float64."""
    spec, w = QuantSpec(4, 32, symmetric), weights(32, 128)

    def error(scales: Tensor, zeros: Tensor) -> Tensor:
        grouped, scale, zero = (
            w.double().reshape(32, -1, 32),
            scales.double().unsqueeze(-1),
            zeros.double().unsqueeze(-1),
        )
        codes = (torch.round(grouped / scale) + zero).clamp(0, spec.max_code)
        return ((codes - zero) * scale - grouped).square().sum(-1)

    chosen, best = error(*fit(w, spec, ScaleSearch())), error(*fit(w.double(), spec, ScaleSearch()))
    assert bool((chosen <= best * (1 + 32 * 2.0**-23)).all())


@SYMMETRY
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (700, 512)], ids=str)
def test_threads_and_strides_change_nothing(threads, shape, symmetric):
    w, spec = weights(*shape), QuantSpec(4, 32, symmetric)
    found = []
    for count, weight in ((1, w), (2, w), (3, w.T.contiguous().T)):
        threads(count)
        found.append(fit(weight, spec, ScaleSearch()))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 12, 33, 128])
def test_folding_adds_the_second_half_onto_the_first(count):
    numbers = weights(3, count)
    expected = [[float(x) for x in row] for row in numbers]
    for row in expected:
        while len(row) > 1:
            half = (len(row) + 1) // 2
            for i in range(len(row) - half):
                row[i] = float(torch.tensor(row[i]) + torch.tensor(row[half + i]))
            del row[half:]
    assert _folded(numbers.clone()).tolist() == [row[0] for row in expected]


def hessian_of(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    x[:, columns // 3] = 0
    return x.T @ x


# Multiples of 16 channels: torch's addr_ rounds twice in those that are left over behind its last
# whole vector.
LOOPS = {
    "static": ({}, 32, 96, 80),
    "static, more than a stripe": ({"block_size": 48}, 32, 192, 144),
    "static, few channels": ({}, 32, 64, 16),
    "static, per row": ({"block_size": 40}, None, 96, 48),
    "off": ({"act_order": "off"}, 32, 160, 80),
    "off, several groups a block": ({"act_order": "off", "block_size": 64}, 16, 160, 80),
    "off, groups wider than a block": ({"act_order": "off", "block_size": 20}, 48, 96, 64),
    "off, per row": ({"act_order": "off", "block_size": 40}, None, 96, 16),
    "group": ({"act_order": "group", "block_size": 64}, 32, 160, 80),
}


@FUSED
@BITS
@SYMMETRY
@pytest.mark.parametrize(("options", "group_size", "columns", "rows"), LOOPS.values(), ids=LOOPS)
def test_the_loop_is_torchs_to_the_bit(
    monkeypatch, instruction_set, bits, symmetric, options, group_size, columns, rows
):
    w, settings = weights(rows, columns), GPTQOptions(search=ScaleSearch(steps=6), **options)
    factor = factorize(hessian_of(columns), settings)
    arguments = (w, factor, QuantSpec(bits, group_size, symmetric), settings)
    ours, torchs = gptq(*arguments), in_torch(monkeypatch, gptq, *arguments)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
    assert (ours.g_idx is None) == (torchs.g_idx is None)
    assert ours.g_idx is None or torch.equal(ours.g_idx, torchs.g_idx)


@FUSED
@pytest.mark.parametrize("count", [1, 2], ids=lambda n: f"{n} threads")
def test_a_block_writes_its_own_columns_and_nothing_else(
    monkeypatch, instruction_set, threads, count
):
    """Errors and the weight behind are torch's to the bit too; what is poisoned before is written
    or left alone."""
    threads(count)
    start, stop, out = 8, 40, 144
    columns = range(16, 32)
    found = []
    for block in (partial(GPTQ._visit_block, groups=[k // 6 for k in range(48)]), native.visit):
        w, codes = weights(48, out), torch.full((48, out), torch.nan)
        errors = torch.full((stop - start, out), torch.nan)
        square = torch.triu(weights(stop - start, stop - start, seed=3)) + torch.eye(stop - start)
        grid = (
            weights(8, out, seed=4).abs() + 0.01,
            torch.full((8, out), 8.0),
            torch.arange(48) // 6,
        )
        block(w, codes, errors, square, grid, start, columns, 15)
        found.append((w, codes, errors))
        written = codes.isfinite().all(dim=1).nonzero().flatten()
        assert written.tolist() == list(columns)
        assert (errors.isfinite().all(dim=1).nonzero().flatten() + start).tolist() == list(columns)
        assert bool((codes.isnan().sum(1)[[*range(16), *range(32, 48)]] == out).all())
        untouched = [*range(start), *range(start, columns.start), *range(stop, 48)]
        assert torch.equal(w[untouched], weights(48, out)[untouched])
    (w, codes, errors), (own_w, own_codes, own_errors) = found
    assert torch.equal(w[columns.stop :], own_w[columns.stop :])
    assert torch.equal(codes.nan_to_num(-1), own_codes.nan_to_num(-1))
    assert torch.equal(errors.nan_to_num(-1), own_errors.nan_to_num(-1))


def test_the_structures_are_those_of_the_header():
    assert ctypes.sizeof(native._Fit) == 6 * 8 + 3 * 8 + 3 * 4 + 4
    assert ctypes.sizeof(native._Visit) == 7 * 8 + 5 * 8 + 4 + 4
