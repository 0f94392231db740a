"""The kernel with 8-bit activations against its definition: the same bits, on every instruction set
that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from int8_twin import product, rounding_bound
from packing import random_weight, shuffled_groups
from test_cpu_kernel import exact, poisoned
from tolerances import dot_bound

from llmquant.errors import UsageError
from llmquant.kernels import KERNELS, choose, native_int8
from llmquant.kernels.cpu import Cpu
from llmquant.kernels.packed_linear import PackedLinear, describe
from llmquant.runtime import native_library
from llmquant.runtime.processor import processor_of
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNEL = KERNELS["cpu_int8"]
BITS = (2, 3, 4, 8)


@pytest.fixture(params=list(native_int8.compiled_instructions()))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, in turn."""
    with native_int8.instructions(request.param):
        yield request.param


def weight(
    bits: int,
    out: int,
    in_: int,
    group: int | None,
    symmetric: bool,
    scales: torch.dtype | None = None,
) -> QuantizedWeight:
    return random_weight(out, in_, QuantSpec(bits, group, symmetric), scale_dtype=scales)


def ordered(bits: int, out: int, in_: int, group: int, symmetric: bool) -> QuantizedWeight:
    spec = QuantSpec(bits, group, symmetric)
    return random_weight(out, in_, spec, g_idx=shuffled_groups(in_, spec.groups(in_)))


CASES = {
    **{
        f"W{b} g{g} {'sym' if s else 'asym'}": (lambda b=b, g=g, s=s: weight(b, 48, 384, g, s))
        for b in BITS for g in (32, 64, 128, None) for s in (True, False)
    },
    **{f"W{b} odd: 7 x 35 g5": (lambda b=b: weight(b, 7, 35, 5, False)) for b in BITS},
    **{f"W{b} one column": (lambda b=b: weight(b, 33, 1, None, False)) for b in BITS},
    **{f"W{b} g_idx": (lambda b=b: ordered(b, 40, 192, 32, False)) for b in BITS},
    **{f"W{b} g_idx, wide groups": (lambda b=b: ordered(b, 20, 600, 300, False)) for b in BITS},
    **{f"W{b} per row of 291": (lambda b=b: weight(b, 20, 291, None, True)) for b in BITS},
    "W4 enough for threads": lambda: weight(4, 1000, 384, 128, True),
    "fp16 scales": lambda: weight(4, 32, 128, 64, False, FP16),
    "fp32 scales": lambda: weight(4, 32, 128, 64, False, FP32),
}  # fmt: skip
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def inputs(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, an outlier."""
    x = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        * 10.0 ** (torch.arange(rows) % 5 - 2)[:, None]
    )
    x[0, 0] = 50
    if rows > 2:
        x[1] = 0
    return x


@every_case
@pytest.mark.parametrize("rows", [1, 2, 5, 29], ids="{} rows".format)
def test_the_product_is_the_definition_bit_for_bit(make, rows, instruction_set, monkeypatch):
    w = make()
    poisoned(monkeypatch)
    x = inputs(rows, w.shape[1])
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
    assert torch.equal(y, product(x, w))


@every_case
def test_rounding_x_changes_no_more_than_half_a_step_per_column(make):
    w = make()
    x = inputs(5, w.shape[1])
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape).double()
    right, magnitude = exact(x, w)
    assert bool(
        (
            (y - right).abs() <= rounding_bound(x, w) + dot_bound(FP32, w.shape[1] + 8) * magnitude
        ).all()
    )


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_and_activations_do_not_overflow(bits, instruction_set):
    for zero, x in ((0, 1.0), (0, -1.0), (2**bits - 1, 1.0), (2**bits - 1, -1.0)):
        for code in (0, 2**bits - 1):
            codes = torch.full((16, 512), code, dtype=torch.uint8)
            zeros = torch.full((16, 2), zero, dtype=torch.uint8)
            w = QuantizedWeight(codes, torch.ones(16, 2), zeros, QuantSpec(bits, 256, False))
            for rows in (1, 4):
                y = KERNEL.linear(
                    torch.full((rows, 512), x), KERNEL.prepare(w, FP32), w.spec, w.shape
                )
                assert torch.equal(y, product(torch.full((rows, 512), x), w))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [1, 4], ids="{} rows".format)
def test_short_dtypes_round_the_same_product_once(dtype, rows, instruction_set):
    w = weight(4, 48, 192, 64, False)
    prepared = KERNEL.prepare(w, dtype)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = KERNEL.linear(x, prepared, w.spec, w.shape)
    assert torch.equal(y, KERNEL.linear(x.float(), prepared, w.spec, w.shape).to(dtype))


def test_a_row_alone_or_among_513_is_the_same():
    w = weight(4, 50, 288, 96, False)
    prepared = KERNEL.prepare(w, FP32)
    x = inputs(513, 288)
    y = KERNEL.linear(x, prepared, w.spec, w.shape)
    assert torch.equal(
        y, torch.cat([KERNEL.linear(row, prepared, w.spec, w.shape) for row in x.split(1)])
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    w = weight(4, 1000, 512, 64, False)
    prepared = KERNEL.prepare(w, FP32)
    before = torch.get_num_threads()
    for rows in (1, 40):
        x = inputs(rows, 512)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(KERNEL.linear(x, prepared, w.spec, w.shape), product(x, w))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_nan_or_infinity_makes_its_row_nan_and_no_other(bits, value, instruction_set):
    w = weight(bits, 20, 64, 32, False)
    for rows in (1, 3):
        x = torch.ones(rows, 64)
        x[0, 5] = value
        y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
        assert bool(torch.isnan(y[0]).all())
        assert bool(torch.isfinite(y[1:]).all())


@pytest.mark.parametrize("size", [1e-45, 2.0**-121, 2.0**-120, 3e38], ids=str)
def test_the_smallest_and_largest_numbers(size, instruction_set):
    w = weight(4, 20, 64, 32, False)
    x = torch.linspace(-1, 1, 64).mul(size)[None].expand(2, 64).contiguous()
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
    assert torch.equal(y, product(x, w))


@every_case
def test_the_weight_is_held_exactly(make):
    w = make()
    assert torch.equal(
        KERNEL.weight(KERNEL.prepare(w, FP32), w.spec, w.shape, FP32), w.dequantize()
    )


def test_buffers_are_those_of_cpu():
    w = weight(4, 64, 128, 64, False)
    mine, strict = KERNEL.prepare(w, FP32), Cpu().prepare(w, FP32)
    assert mine.keys() == strict.keys()
    assert all(torch.equal(mine[name], strict[name]) for name in mine)


def test_auto_never_takes_it(monkeypatch):
    assert choose(QuantSpec(4, 128), (256, 256), torch.device("cpu"), FP32)[0].name == "cpu"
    monkeypatch.setattr(native_library, "library", lambda: None)
    kernel, refusals = choose(QuantSpec(4, 128), (256, 256), torch.device("cpu"), FP32)
    assert kernel.name == "reference"
    assert "cpu_int8" not in refusals
    with pytest.raises(UsageError, match=r"kernel cpu_int8 cannot take .* install g"):
        choose(QuantSpec(4, 128), (256, 256), torch.device("cpu"), FP32, prefer="cpu_int8")


def test_a_layer_names_it():
    layer = PackedLinear(weight(4, 32, 64, 32, False), dtype=FP32, kernel="cpu_int8")
    assert "kernel=cpu_int8" in repr(layer)
    assert describe(torch.nn.Sequential(layer)).kernels == {"cpu_int8": 1}
    assert layer.to(BF16)(torch.ones(2, 64, dtype=BF16)).dtype == BF16


def test_inputs_are_not_rounded_twice():
    with pytest.raises(UsageError, match="a second time"):
        PackedLinear(
            weight(8, 32, 64, None, True), dtype=FP32, kernel="cpu_int8", activations="int8-dynamic"
        )


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions_are_kept(shape):
    w = weight(4, 32, 64, 32, False)
    assert KERNEL.linear(torch.ones(shape), KERNEL.prepare(w, FP32), w.spec, w.shape).shape == (
        *shape[:-1],
        32,
    )


def test_gradients_go_to_the_input_past_the_rounding():
    w = weight(4, 32, 64, 32, True)
    prepared = KERNEL.prepare(w, FP32)
    x = torch.randn(3, 64, requires_grad=True)
    y = KERNEL.linear(x, prepared, w.spec, w.shape)
    assert torch.equal(y, KERNEL.linear(x.detach(), prepared, w.spec, w.shape))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(3, 64))


def test_torch_compile_and_export_see_one_operator():
    layer = PackedLinear(weight(4, 32, 64, 32, False), dtype=FP32, kernel="cpu_int8")
    x = torch.randn(3, 64)
    eager = layer(x)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), eager)
    exported = torch.export.export(layer, (x,))
    assert [n for n in exported.graph.nodes if "packed_linear_int8" in str(n.target)]
    assert torch.equal(exported.module()(x), eager)


@pytest.mark.parametrize(
    ("x", "words"),
    [(torch.ones(1, 64, dtype=torch.float64), "float64"), (torch.ones(1, 32), "64 input columns")],
    ids=["float64", "another width"],
)
def test_inputs_that_do_not_fit_are_refused(x, words):
    w = weight(4, 32, 64, 32, True)
    with pytest.raises(UsageError, match=words):
        KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)


def test_what_torch_is_held_to_holds_it_too():
    processor = processor_of(
        "x86_64", "some", frozenset({"avx2", "fma"}), {"ATEN_CPU_CAPABILITY": "default"}
    )
    assert native_int8.best_instructions(processor) == "generic"
    with pytest.raises(UsageError, match="there are"), native_int8.instructions("mmx"):
        pass
