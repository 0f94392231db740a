"""Every kernel against the definition: the weight exactly, the product within the roundings it is
allowed."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import pytest
import torch
from packing import needs_int4, random_weight, shuffled_groups
from tolerances import ROUNDOFF, dot_bound
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import KERNELS, choose
from llmquant.kernels.int4 import cpu as cpu_int4_module
from llmquant.kernels.int4 import cpu_layout
from llmquant.kernels.int4.cpu import CROSSOVER_ROWS, CpuInt4
from llmquant.kernels.int4.parameters import operator_group
from llmquant.kernels.reference import narrowest
from llmquant.runtime import native_library
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def case(
    out: int,
    in_: int,
    group: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype | None = None,
    ordered: bool = False,
) -> QuantizedWeight:
    spec = QuantSpec(4, group, symmetric)
    g_idx = shuffled_groups(in_, spec.groups(in_)) if ordered else None
    return random_weight(out, in_, spec, scale_dtype=scale_dtype, g_idx=g_idx)


INT4_CASES = {
    "g128 sym": lambda: case(192, 512, 128, True),
    "g128 asym": lambda: case(192, 512, 128, False),
    "g32 asym": lambda: case(128, 256, 32, False),
    "g64 sym": lambda: case(128, 256, 64, True),
    "g256 asym": lambda: case(64, 768, 256, False),
    "per row asym": lambda: case(64, 768, None, False),
    "g96 is three of 32": lambda: case(64, 192, 96, False),
    "g512 is two of 256": lambda: case(64, 1024, 512, True),
    "rows not a multiple of 64": lambda: case(100, 256, 128, False),
    "one row": lambda: case(1, 64, 64, False),
    "more rows than one look-up tile": lambda: case(64 * 33, 128, 128, False),
    "more columns than one look-up tile": lambda: case(64, 1152, 128, False),
    "fp16 scales sym": lambda: case(128, 256, 128, True, torch.float16),
    "fp16 scales asym": lambda: case(100, 256, 64, False, torch.float16),
    "g_idx sym": lambda: case(128, 256, 64, True, ordered=True),
    "g_idx asym": lambda: case(100, 256, 32, False, ordered=True),
}
OTHER_CASES = {
    "2 bits": lambda: random_weight(40, 96, QuantSpec(2, 32, True)),
    "3 bits asym": lambda: random_weight(33, 96, QuantSpec(3, 48, False)),
    "8 bits asym": lambda: random_weight(17, 100, QuantSpec(8, 50, False)),
    "odd sizes": lambda: random_weight(7, 35, QuantSpec(4, 5, False)),
    "odd sizes g_idx": lambda: random_weight(
        7, 35, QuantSpec(3, 5, False), g_idx=shuffled_groups(35, 7)
    ),
    "fp32 scales": lambda: random_weight(
        16, 64, QuantSpec(4, 32, False), scale_dtype=torch.float32
    ),
}


def exact_product(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """float64 ``x @ W.T``, and ``|x| @ |W|.T``, the scale against which rounding errors are
    bounded."""
    w = weight.dequantize().double()
    return x.double() @ w.T, x.double().abs() @ w.abs().T


@needs_int4
@pytest.mark.parametrize("make", INT4_CASES.values(), ids=INT4_CASES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_cpu_int4_holds_the_weight_exactly(make, dtype):
    weight = make()
    prepared = CpuInt4().prepare(weight, BF16)
    assert torch.equal(
        CpuInt4().weight(prepared, weight.spec, weight.shape, dtype), weight.dequantize(dtype)
    )


@pytest.mark.parametrize("make", (INT4_CASES | OTHER_CASES).values(), ids=INT4_CASES | OTHER_CASES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_reference_and_dense_hold_the_weight_exactly(make, dtype):
    weight = make()
    for name in ("reference", "dense"):
        kernel = KERNELS[name]
        assert (
            kernel.why_not(weight.spec, weight.shape, CPU, dtype, weight.g_idx is not None) is None
        )
        prepared = kernel.prepare(weight, dtype)
        assert torch.equal(
            kernel.weight(prepared, weight.spec, weight.shape, dtype), weight.dequantize(dtype)
        )
        x = torch.randn(3, weight.shape[1], dtype=dtype)
        expected = torch.nn.functional.linear(x, weight.dequantize(dtype))
        assert torch.equal(kernel.linear(x, prepared, weight.spec, weight.shape), expected)


@needs_int4
@pytest.mark.parametrize("make", INT4_CASES.values(), ids=INT4_CASES)
@pytest.mark.parametrize("rows", [1, 3, CROSSOVER_ROWS - 1, CROSSOVER_ROWS, CROSSOVER_ROWS + 17])
def test_cpu_int4_product_is_within_bf16_rounding(make, rows):
    weight = make()
    kernel = CpuInt4()
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(BF16)
    y = kernel.linear(x, kernel.prepare(weight, BF16), weight.spec, weight.shape)
    exact, scale = exact_product(x, weight)
    # Operator: the result is rounded, and rounded again when a correction is added. GEMM: weights
    # and result are.
    assert bool(((y.double() - exact).abs() <= 2.01 * ROUNDOFF[BF16] * scale).all())
    assert y.shape == (rows, weight.shape[0])
    assert y.dtype == BF16


@needs_int4
def test_many_rows_are_a_dense_linear_over_the_rounded_weight():
    weight = case(192, 512, 128, False)
    x = torch.randn(CROSSOVER_ROWS, 512).to(BF16)
    y = CpuInt4().linear(x, CpuInt4().prepare(weight, BF16), weight.spec, weight.shape)
    rounded = weight.dequantize(BF16).double()
    exact, scale = x.double() @ rounded.T, x.double().abs() @ rounded.abs().T
    # One rounding to bf16 of a float32 sum in any order: without bf16 instructions torch sums in
    # blocks of its own.
    assert bool(
        (
            (y.double() - exact).abs()
            <= ROUNDOFF[BF16] * exact.abs() + dot_bound(torch.float32, 512) * scale
        ).all()
    )


@needs_int4
@pytest.mark.parametrize("make", INT4_CASES.values(), ids=INT4_CASES)
def test_dequantized_tiles_are_the_rounded_weight_bit_for_bit(make, monkeypatch):
    weight = make()
    prepared = CpuInt4().prepare(weight, BF16)
    in_features = weight.shape[1]
    # Multiplying by the identity reads the tiles themselves; a tiny tile makes many of them.
    monkeypatch.setattr(cpu_int4_module, "_TILE_BYTES", 64 * in_features * 2)
    monkeypatch.setattr(cpu_int4_module, "CROSSOVER_ROWS", 1)
    columns = CpuInt4().linear(
        torch.eye(in_features, dtype=BF16), prepared, weight.spec, weight.shape
    )
    assert torch.equal(columns.T, weight.dequantize(BF16))


@needs_int4
@pytest.mark.parametrize("correction", [True, False], ids=["with the residual", "without it"])
def test_the_residual_is_what_makes_zero_points_exact(correction):
    # Codes at the zero-point or one above, far from 8: small weights, large (8 - z) * s that bf16
    # cannot hold.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 3, (64, 256), generator=generator, dtype=torch.uint8)
    scales = torch.full((64, 2), 251 / 2**15)
    weight = QuantizedWeight(
        codes, scales, torch.ones(64, 2, dtype=torch.uint8), QuantSpec(4, 128, False)
    )
    prepared = CpuInt4().prepare(weight, BF16)
    if not correction:
        del prepared["residual"]
    x = torch.rand(4, 256, generator=generator).to(BF16)
    exact, scale = exact_product(x, weight)
    error = (CpuInt4().linear(x, prepared, weight.spec, weight.shape).double() - exact).abs()
    assert bool((error <= 2.01 * ROUNDOFF[BF16] * scale).all()) == correction


@needs_int4
@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions_are_kept(shape):
    weight = case(32, 64, 32, False)
    y = CpuInt4().linear(
        torch.ones(shape, dtype=BF16), CpuInt4().prepare(weight, BF16), weight.spec, weight.shape
    )
    assert y.shape == (*shape[:-1], 32)


@needs_int4
def test_a_strided_input_is_read_as_it_is():
    weight = case(32, 64, 32, True)
    prepared = CpuInt4().prepare(weight, BF16)
    x = torch.randn(2, 5, 64).to(BF16)[:, -1:]
    assert torch.equal(
        CpuInt4().linear(x, prepared, weight.spec, weight.shape),
        CpuInt4().linear(
            x.clone(memory_format=torch.contiguous_format), prepared, weight.spec, weight.shape
        ),
    )


@needs_int4
@pytest.mark.parametrize("rows", [1, 64, 100, 128, 1100])
def test_int4_layout_reads_back(rows):
    codes = torch.randint(0, 16, (rows, 96), dtype=torch.uint8)
    packed = cpu_layout.pack(codes)
    block = cpu_layout.block_rows()
    assert block is not None
    assert packed.shape == (cpu_layout.padded_rows(rows), 48)
    unpacked = cpu_layout.unpack(packed, block)
    assert torch.equal(unpacked[:rows], codes)
    assert not bool(unpacked[rows:].any())


@needs_int4
def test_scratch_serves_inference_mode_and_plain_mode_alike():
    weight = case(64, 128, 64, False)
    prepared = CpuInt4().prepare(weight, BF16)
    x = torch.randn(CROSSOVER_ROWS, 128).to(BF16)
    with torch.inference_mode():
        inside = CpuInt4().linear(x, prepared, weight.spec, weight.shape).clone()
    assert torch.equal(CpuInt4().linear(x, prepared, weight.spec, weight.shape), inside)


@needs_int4
@pytest.mark.parametrize(
    ("spec", "device", "dtype", "words"),
    [
        (QuantSpec(4, 128), "cpu", torch.float16, "float16"),
        (QuantSpec(4, 128), "cpu", torch.float32, "float32"),
        (QuantSpec(8, 128), "cpu", BF16, "4 bits"),
        (QuantSpec(3, 128), "cpu", BF16, "4 bits"),
        (QuantSpec(4, 16), "cpu", BF16, "multiple of 32"),
        (QuantSpec(4, 128), "meta", BF16, "meta"),
    ],
    ids=lambda v: str(v),
)
def test_cpu_int4_refuses_with_a_reason(spec, device, dtype, words, caplog):
    with (
        caplog.at_level(logging.INFO, "llmquant.kernels"),
        pytest.raises(UsageError, match="kernel cpu_int4 cannot take"),
    ):
        choose(spec, (256, 256), torch.device(device), dtype, prefer="cpu_int4")
    assert words in caplog.text


@needs_int4
def test_without_the_compiled_kernel_auto_takes_torchs_operator_where_it_can(monkeypatch):
    monkeypatch.setattr(native_library, "library", lambda: None)
    for spec, dtype, name in (
        (QuantSpec(4, 128), BF16, "cpu_int4"), (QuantSpec(4, 128), torch.float32, "reference"),
        (QuantSpec(8, 128), BF16, "reference"),
    ):  # fmt: skip
        kernel, refusals = choose(spec, (256, 256), CPU, dtype)
        assert kernel.name == name
        assert "compiled" in refusals["cpu"]


def test_another_device_gets_the_reference():
    kernel, refusals = choose(QuantSpec(4, 128), (256, 256), torch.device("meta"), BF16)
    assert kernel.name == "reference"
    assert "meta" in refusals["cpu"]


@needs_int4
def test_choice_looks_at_the_numbers_when_it_has_them():
    wide = random_weight(64, 128, QuantSpec(4, 64, True), scale_dtype=torch.float32)
    uneven = random_weight(
        64, 128, QuantSpec(4, 64, True), g_idx=torch.tensor([0] * 50 + [1] * 78, dtype=torch.int32)
    )
    for weight, words in ((wide, "significant bits"), (uneven, "different sizes")):
        ordered = weight.g_idx is not None
        with pytest.raises(UsageError, match=words):
            choose(weight.spec, weight.shape, CPU, BF16, ordered, "cpu_int4", weight)
        assert (
            choose(weight.spec, weight.shape, CPU, BF16, ordered, "cpu_int4")[0].name == "cpu_int4"
        )


def test_an_unknown_kernel_is_a_usage_error():
    with pytest.raises(
        UsageError,
        match="choose auto, cpu, cpu_int4, humming, gemlite, cuda_int4, reference, dense, cpu_int8",
    ):
        choose(QuantSpec(), (64, 128), CPU, BF16, prefer="fast")


def test_the_crossover_is_the_measured_one():
    report = json.loads(
        (Path(__file__).parents[2] / "bench" / "results" / "crossover.json").read_text()
    )
    measured = [run["crossover_rows"] for run in report["runs"]]
    assert statistics.median(measured) == CROSSOVER_ROWS


@needs_int4
def test_cpu_int4_refuses_activations_of_another_dtype():
    weight = case(32, 64, 32, True)
    with pytest.raises(UsageError, match="float16"):
        CpuInt4().linear(
            torch.ones(1, 64).half(), CpuInt4().prepare(weight, BF16), weight.spec, weight.shape
        )


def test_dense_does_not_round_twice():
    weight = case(32, 64, 32, True)
    prepared = KERNELS["dense"].prepare(weight, BF16)
    with pytest.raises(UsageError, match="kernel reference"):
        KERNELS["dense"].weight(prepared, weight.spec, weight.shape, torch.float32)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.0078125, BF16),
        (1 + 2.0**-10, torch.float16),
        (1 + 2.0**-20, torch.float32),
        (2.0**-30, BF16),
    ],
    ids=["8 bits", "11 bits", "21 bits", "below fp16's range"],
)
def test_scales_are_stored_in_the_narrowest_exact_dtype(value, dtype):
    assert narrowest(torch.tensor([[value]])).dtype == dtype


@pytest.mark.parametrize(
    ("width", "group"),
    [(128, 128), (96, 32), (512, 256), (768, 256), (11008, 256), (160, 32), (48, None), (16, None)],
)
def test_operator_group_is_the_widest_that_divides(width, group):
    assert operator_group(width) == group
