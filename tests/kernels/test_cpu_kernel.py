"""The compiled CPU kernel against the definition, on every instruction set that this machine
has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from packing import random_weight, shuffled_groups
from tolerances import ROUNDOFF, dot_bound
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import choose, native
from llmquant.kernels import cpu as cpu_module
from llmquant.kernels.cpu import Cpu, unit
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.runtime import native_library
from llmquant.runtime.processor import processor_of, this_processor
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNEL = Cpu()


@pytest.fixture(params=list(native.compiled_instructions()))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, in turn."""
    with native.instructions(request.param):
        yield request.param


def test_the_kernel_is_compiled_and_has_the_instruction_sets_of_this_processor():
    assert native.why_missing() is None
    processor = this_processor()
    expected = (
        {"generic"}
        | ({"avx2"} if processor.has("avx2") else set())
        | ({"avx512"} if processor.has("avx512f") else set())
    )
    assert expected <= set(native.compiled_instructions())


def weight(
    bits: int,
    out: int,
    in_: int,
    group: int | None,
    symmetric: bool,
    scales: torch.dtype | None = None,
) -> QuantizedWeight:
    return random_weight(out, in_, QuantSpec(bits, group, symmetric), scale_dtype=scales)


def ordered(
    bits: int, out: int, in_: int, group: int, symmetric: bool, even: bool = True
) -> QuantizedWeight:
    spec = QuantSpec(bits, group, symmetric)
    g_idx = shuffled_groups(in_, spec.groups(in_))
    if not even:
        g_idx = g_idx.clone()
        g_idx[: group // 2 + 1] = g_idx[0]
    return random_weight(out, in_, spec, g_idx=g_idx)


CASES = {
    **{
        f"W{bits} g{group} {'sym' if symmetric else 'asym'}": (
            lambda b=bits, g=group, s=symmetric: weight(b, 48, 192, g, s)
        )
        for bits in (2, 3, 4, 8)
        for group in (32, 64, None)
        for symmetric in (True, False)
    },
    **{
        f"W{bits} odd: 7 x 35 g5": (lambda b=bits: weight(b, 7, 35, 5, False))
        for bits in (2, 3, 4, 8)
    },
    **{f"W{bits} one row": (lambda b=bits: weight(b, 1, 64, 64, False)) for bits in (2, 3, 4, 8)},
    **{
        f"W{bits} one column": (lambda b=bits: weight(b, 33, 1, None, False))
        for bits in (2, 3, 4, 8)
    },
    **{f"W{bits} g_idx": (lambda b=bits: ordered(b, 40, 128, 32, False)) for bits in (2, 3, 4, 8)},
    "W4 g_idx of uneven groups": lambda: ordered(4, 24, 96, 16, True, even=False),
    "W4 g16": lambda: weight(4, 64, 64, 16, True),
    "W4 g8 asym": lambda: weight(4, 17, 24, 8, False),
    "W3 per row of 43": lambda: weight(3, 20, 43, None, True),
    "W4 wider than a panel": lambda: weight(4, 33, 600, 24, False),
    "W8 wider than a panel": lambda: weight(8, 16, 520, 52, True),
    "W2 wider than a panel": lambda: weight(2, 16, 1040, None, False),
    "W3 wider than a panel": lambda: weight(3, 16, 800, 100, False),
    "W4 enough for threads": lambda: weight(4, 1000, 384, 128, True),
    "fp16 scales": lambda: weight(4, 32, 128, 64, False, FP16),
    "fp32 scales": lambda: weight(4, 32, 128, 64, False, FP32),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are filled with NaN first, so that an element nobody wrote is seen."""
    plain = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, **k: plain(self, *shape, **k).fill_(float("nan"))
    )


def exact(x: Tensor, w: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """float64 product, and the magnitude that rounding errors are bounded by: the kernel sums ``q
    x`` and ``zero x`` apart."""
    dense = w.dequantize().double()
    group = w.column_groups()
    magnitude = (w.codes.double() + w.zeros.double()[:, group]) * w.scales.double().abs()[:, group]
    return x.double() @ dense.T, x.double().abs() @ magnitude.T


@every_case
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 29], ids="{} rows".format)
def test_the_product_is_right_within_float32_rounding(make, rows, instruction_set, monkeypatch):
    w = make()
    poisoned(monkeypatch)
    x = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(1))
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
    assert y.shape == (rows, w.shape[0])
    product, magnitude = exact(x, w)
    assert bool(((y.double() - product).abs() <= dot_bound(FP32, w.shape[1] + 4) * magnitude).all())


@every_case
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [1, 4], ids="{} rows".format)
def test_short_dtypes_round_the_same_product_once(make, dtype, rows, instruction_set):
    w = make()
    prepared = KERNEL.prepare(w, dtype)
    x = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    y = KERNEL.linear(x, prepared, w.spec, w.shape)
    assert torch.equal(y, KERNEL.linear(x.float(), prepared, w.spec, w.shape).to(dtype))


@every_case
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_weight_is_the_definition_bit_for_bit(make, dtype, instruction_set):
    w = make()
    prepared = KERNEL.prepare(w, dtype)
    assert torch.equal(KERNEL.weight(prepared, w.spec, w.shape, dtype), w.dequantize(dtype))


@every_case
def test_the_identity_reads_the_weight_itself(make, instruction_set):
    w = make()
    y = KERNEL.linear(torch.eye(w.shape[1]), KERNEL.prepare(w, FP32), w.spec, w.shape)
    assert torch.equal(y.T, w.dequantize())


@pytest.mark.parametrize("rows", [263, 264, 265, 530], ids="{} rows".format)
def test_blocks_of_rows_join_without_a_seam(rows, instruction_set, monkeypatch):
    w = weight(4, 50, 288, 96, False)
    poisoned(monkeypatch)
    x = torch.randn(rows, 288, generator=torch.Generator().manual_seed(3))
    product, magnitude = exact(x, w)
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
    assert bool(((y.double() - product).abs() <= dot_bound(FP32, 292) * magnitude).all())


@every_case
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_product_by_torch_reads_the_same_weight(make, dtype, instruction_set, monkeypatch):
    w = make()
    monkeypatch.setattr(cpu_module, "rows_for_torch", lambda _: 1)
    monkeypatch.setattr(
        cpu_module, "_TILE_BYTES", 32 * w.shape[1]
    )  # a tiny tile makes many of them
    y = KERNEL.linear(torch.eye(w.shape[1], dtype=dtype), KERNEL.prepare(w, dtype), w.spec, w.shape)
    assert torch.equal(y.T, w.dequantize(dtype))


@pytest.mark.parametrize("needed", ["amx_bf16", "avx512_bf16"])
def test_where_torch_may_win_its_rows_are_measured(needed, monkeypatch):
    """What runs on processors with AVX-512 alone: the measurement gives a number of rows, and both
    sides of it work."""
    fast = processor_of("x86_64", "some", frozenset({"avx2", "fma", "avx512f", needed}), {})
    monkeypatch.setattr(cpu_module, "this_processor", lambda: fast)
    measure = cpu_module.rows_for_torch.__wrapped__
    found = measure(BF16)
    assert found in (16, 32, 64, 128, 256, 512, cpu_module._NEVER)
    assert measure(FP16) == measure(FP32) == cpu_module._NEVER
    monkeypatch.setattr(
        cpu_module, "_best_of", lambda work, *_: 1.0 if work is native.linear else 0.5
    )
    assert measure(BF16) == 16
    monkeypatch.setattr(
        cpu_module, "_best_of", lambda work, *_: 0.5 if work is native.linear else 1.0
    )
    assert measure(BF16) == cpu_module._NEVER


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    w = weight(4, 1000, 512, 64, False)
    prepared = KERNEL.prepare(w, FP32)
    before = torch.get_num_threads()
    for rows in (1, 40):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(4))
        alone = KERNEL.linear(x, prepared, w.spec, w.shape)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(KERNEL.linear(x, prepared, w.spec, w.shape), alone)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions_are_kept(shape):
    w = weight(4, 32, 64, 32, False)
    assert KERNEL.linear(torch.ones(shape), KERNEL.prepare(w, FP32), w.spec, w.shape).shape == (
        *shape[:-1],
        32,
    )


def test_a_strided_input_is_read_as_it_is():
    w = weight(4, 32, 64, 32, True)
    prepared = KERNEL.prepare(w, FP32)
    x = torch.randn(2, 5, 64)[:, -1:]
    assert torch.equal(
        KERNEL.linear(x, prepared, w.spec, w.shape),
        KERNEL.linear(x.clone(), prepared, w.spec, w.shape),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_nan_or_infinity_of_the_input_reaches_the_output(bits, value):
    w = weight(bits, 20, 64, 32, False)
    for rows in (1, 3):
        x = torch.ones(rows, 64)
        x[0, 5] = value
        y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)
        assert not bool(torch.isfinite(y[0]).all())
        assert bool(torch.isfinite(y[1:]).all())


def test_gradients_go_to_the_input():
    w = weight(4, 32, 64, 32, True)
    x = torch.randn(3, 64, requires_grad=True)
    KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(3, 64))


def test_memory_is_the_packed_bytes():
    for bits in (2, 3, 4, 8):
        layer = PackedLinear(weight(bits, 256, 512, 128, True), dtype=FP32, kernel="cpu")
        assert layer.packed_bytes() == 256 * 512 * bits // 8 + 256 * 4 * 2


def test_torch_compile_and_export_see_one_operator():
    layer = PackedLinear(weight(4, 32, 64, 32, False), dtype=FP32, kernel="cpu")
    x = torch.randn(3, 64)
    eager = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), eager)
    exported = torch.export.export(layer, (x,))
    assert [n for n in exported.graph.nodes if "packed_linear" in str(n.target)]
    assert torch.equal(exported.module()(x), eager)
    fake = torch.library.opcheck(
        torch.ops.llmquant.packed_linear,
        (x, layer.words, layer.scales, layer.zeros, None, 4, 32, 64),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(fake.values()) == {"SUCCESS"}


def test_buffers_that_moved_are_found_again():
    layer = PackedLinear(weight(4, 32, 64, 32, False), dtype=FP32, kernel="cpu")
    x = torch.randn(2, 64)
    before = layer(x)
    layer.words.data = layer.words.data.clone()
    assert torch.equal(layer(x), before)
    import copy

    other = copy.deepcopy(layer)
    del layer
    assert torch.equal(other(x), before)
    assert torch.equal(other.to(BF16)(x.to(BF16)), other.to(FP32)(x.to(BF16).float()).to(BF16))


@pytest.mark.parametrize(
    ("held", "expected"),
    [("default", "generic"), ("avx2", "avx2")],
    ids=["held to nothing", "held to AVX2"],
)
def test_what_torch_is_held_to_holds_the_kernel(held, expected):
    flags = frozenset({"avx2", "fma", "f16c", "avx512f"})
    processor = processor_of(
        this_processor().architecture, "some", flags, {"ATEN_CPU_CAPABILITY": held}
    )
    wanted = (
        expected
        if this_processor().is_x86 and expected in native.compiled_instructions()
        else "generic"
    )
    assert native.best_instructions(processor) == wanted


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="there are"), native.instructions("mmx"):
        pass


def test_without_the_library_the_kernel_says_why_and_another_is_taken(monkeypatch):
    monkeypatch.setattr(native_library, "library", lambda: None)
    kernel, refusals = choose(QuantSpec(4, 128), (256, 256), torch.device("cpu"), FP32)
    assert kernel.name == "reference"
    assert "install g++" in refusals["cpu"]


@pytest.mark.parametrize(
    ("x", "words"),
    [(torch.ones(1, 64, dtype=torch.float64), "float64"), (torch.ones(1, 32), "64 input columns")],
    ids=["float64", "another width"],
)
def test_inputs_that_do_not_fit_are_refused(x, words):
    w = weight(4, 32, 64, 32, True)
    with pytest.raises(UsageError, match=words):
        KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape)


def test_the_structure_is_the_one_of_the_header():
    assert ctypes.sizeof(native._Weight) == 4 * 8 + 4 * 8 + 2 * 4


@pytest.mark.parametrize(("bits", "columns"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_a_unit_fills_whole_words(bits, columns):
    assert unit(bits) == columns


def test_the_error_bound_is_not_idle():
    """The bound that the products are held to would notice a weight off by one code."""
    w = weight(4, 16, 64, 32, False)
    x = torch.randn(1, 64)
    codes = w.codes.clone()
    codes[0, 0] ^= 1
    product, magnitude = exact(x, QuantizedWeight(codes, w.scales, w.zeros, w.spec))
    y = KERNEL.linear(x, KERNEL.prepare(w, FP32), w.spec, w.shape).double()
    assert not bool(((y - product).abs() <= dot_bound(FP32, 68) * magnitude).all())
    assert ROUNDOFF[FP32] < 1e-7
