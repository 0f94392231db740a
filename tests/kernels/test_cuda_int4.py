"""torch's int4 CUDA operator without a GPU: its layout is held to the packing kernel's own lines,
written out byte by byte, and the operator's arithmetic to a twin on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquant.kernels import KERNELS, choose
from llmquant.kernels.gpu import device as gpu_device
from llmquant.kernels.gpu.device import Gpu
from llmquant.kernels.int4 import cuda_layout
from llmquant.kernels.int4.cuda import GEMM_ROWS, CudaInt4
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

KERNEL = CudaInt4()
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def as_the_kernel_packs(bytes_: Tensor, inner: int) -> Tensor:
    """``matrix_to_m16n8k16_Bint4_layout`` of aten/src/ATen/native/cuda/int4mm.cu, a thread at a
    time: uint8 ``[n, k / 2]``, the even column in the high half."""
    n, half = bytes_.shape
    out = torch.zeros(n // 8, half * 2 // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for tile in range(out.shape[0]):
        for outer in range(out.shape[1]):
            for t in range(32):
                for k_tile in range(0, inner, 2):
                    base = (outer * inner + k_tile) * 8
                    columns = (base + t % 4, base + t % 4 + 4, base + 8 + t % 4, base + 12 + t % 4)
                    v = [int(bytes_[tile * 8 + t // 4, c]) for c in columns]
                    low = sum((b & 15) << 16 + 4 * i for i, b in enumerate(v))
                    high = sum((b >> 4) << 4 * i for i, b in enumerate(v))
                    out[tile, outer, t, k_tile // 2] = low | high
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def halves(codes: Tensor) -> Tensor:
    return codes[:, ::2] << 4 | codes[:, 1::2]


def as_the_operator_multiplies(x: Tensor, packed: Tensor, group: int, params: Tensor) -> Tensor:
    """Weights ``(q - 8) * s + zero`` rounded to bf16, products summed in float32."""
    codes = cuda_layout.unpack(packed).float() - 8
    scales, zeros = (params[..., i].T.float().repeat_interleave(group, dim=1) for i in (0, 1))
    weight = torch.addcmul(zeros, codes, scales).to(BF16)
    return (x.float() @ weight.float().T).to(BF16)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaInt4, "_operator", lambda _: as_the_operator_multiplies)


def weight_of(
    out: int, width: int, group: int | None, *, symmetric: bool = True, seed: int = 0,
    scale_dtype: torch.dtype = BF16, order: bool = False,
) -> QuantizedWeight:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits=4, group_size=group, symmetric=symmetric)
    groups = spec.groups(width)
    zeros = (
        torch.full((out, groups), 8, dtype=torch.uint8)
        if symmetric
        else torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8)
    )
    columns = torch.arange(width) // (group or width)
    return QuantizedWeight(
        torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8),
        (torch.rand(out, groups, generator=generator) / 64 + 0.01).to(scale_dtype).float(),
        zeros,
        spec,
        columns[torch.randperm(width, generator=generator)].to(torch.int32) if order else None,
    )


WEIGHTS = {
    "g32": weight_of(24, 128, 32),
    "g128, rows that are no multiple of 8": weight_of(13, 256, 128),
    "a row, two tiles together": weight_of(8, 96, None),
    "g64 with zero-points": weight_of(16, 192, 64, symmetric=False),
    "g512: repeated": weight_of(8, 1024, 512, symmetric=False),
    "fp16 scales": weight_of(16, 128, 32, symmetric=False, scale_dtype=torch.float16),
    "columns in an order of their own": weight_of(16, 128, 32, order=True),
}
any_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())


@pytest.mark.parametrize(("columns", "inner"), [(128, 8), (256, 8), (192, 4), (96, 2)])
def test_bytes_are_those_of_torchs_packing_kernel(columns: int, inner: int) -> None:
    codes = torch.randint(0, 16, (16, columns), dtype=torch.uint8)
    assert cuda_layout.inner_tiles(columns) == inner
    assert torch.equal(cuda_layout.pack(codes), as_the_kernel_packs(halves(codes), inner))


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), tiles=st.integers(1, 12), seed=st.integers(0, 1000))
def test_unpacking_undoes_packing(rows: int, tiles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 32 * tiles), generator=generator, dtype=torch.uint8)
    unpacked = cuda_layout.unpack(cuda_layout.pack(codes))
    assert torch.equal(unpacked[:rows], codes)
    assert not unpacked[rows:].any()
    assert len(unpacked) == cuda_layout.padded_rows(rows)


@pytest.mark.parametrize(
    ("packing", "agrees"),
    [
        pytest.param(as_the_kernel_packs, True, id="as known"),
        pytest.param(lambda b, i: as_the_kernel_packs(b >> 4 | b << 4, i), False, id="halves swapped"),
    ],
)  # fmt: skip
def test_a_torch_that_packs_otherwise_is_noticed(
    packing: Callable[[Tensor, int], Tensor], agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", packing)
    assert cuda_layout.agrees.__wrapped__(torch.device("cpu")) is agrees


@any_weight
def test_the_weight_and_its_rows_are_exact(weight: QuantizedWeight) -> None:
    prepared = KERNEL.prepare(weight, BF16)
    for dtype in (torch.float32, BF16):
        found = KERNEL.weight(prepared, weight.spec, weight.shape, dtype)
        assert torch.equal(found, weight.dequantize(dtype))
    ids = torch.tensor([weight.shape[0] - 1, 0, 3, 0])
    rows = KERNEL.rows(prepared, ids, weight.spec, weight.shape)
    assert torch.equal(rows, weight.dequantize(torch.float32)[ids])


@any_weight
@pytest.mark.parametrize("rows", [1, 5, GEMM_ROWS - 1, GEMM_ROWS, GEMM_ROWS + 3])
@pytest.mark.usefixtures("operator")
def test_products_are_those_of_the_dequantized_weight(weight: QuantizedWeight, rows: int) -> None:
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).to(BF16)
    found = KERNEL.linear(x, KERNEL.prepare(weight, BF16), weight.spec, weight.shape)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    # Weights and results are rounded to 8 bits each, weights of all columns independently.
    bound = 2**-8 * (x.double().abs() @ weight.dequantize(torch.float32).double().abs().T)
    assert found.shape == (rows, weight.shape[0])
    assert ((found.double() - exact).abs() <= bound + 2**-8 * exact.abs()).all()


@pytest.mark.usefixtures("operator")
def test_what_bf16_does_not_hold_of_a_zero_point_is_put_back() -> None:
    """x is 1 everywhere and every weight has its opposite beside it, so that all that is left of
    the sum is what is lost of the zero-points."""
    drawn = weight_of(64, 256, 256, symmetric=False, seed=3)
    zeros = drawn.zeros.clamp(1, 14)
    codes = zeros.repeat(1, 256) + torch.tensor([1, -1]).repeat(128)
    weight = QuantizedWeight(codes.to(torch.uint8), drawn.scales, zeros, drawn.spec)
    x, prepared = torch.ones(1, 256, dtype=BF16), KERNEL.prepare(weight, BF16)
    assert not weight.dequantize(torch.float64).sum(1).any()
    found = KERNEL.linear(x, prepared, weight.spec, weight.shape).float()
    without = {n: t for n, t in prepared.items() if n != "residual"}
    lost = KERNEL.linear(x, without, weight.spec, weight.shape).float()
    assert found.abs().mean() < 0.5 * lost.abs().mean()


def on_any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU that the operator knows."""
    monkeypatch.setattr(gpu_device, "find", lambda _: Gpu(amd=False, capability=(9, 0)))
    monkeypatch.setattr(cuda_layout, "agrees", lambda _: True)


@pytest.mark.parametrize(
    ("spec", "shape", "device", "dtype", "reason"),
    [
        (QuantSpec(4, 128), (64, 256), torch.device("cpu"), BF16, "runs on an NVIDIA GPU, not on cpu"),
        (QuantSpec(3, 128), (64, 256), CUDA, BF16, "it takes 4 bits, not 3"),
        (QuantSpec(4, 128), (64, 256), CUDA, torch.float16, "takes torch.bfloat16, not torch.float16"),
        (QuantSpec(4, 16), (64, 256), CUDA, BF16, "groups of 16 columns are not a multiple of 32"),
    ],
)  # fmt: skip
def test_what_it_cannot_take_is_said(
    spec: QuantSpec, shape: tuple[int, int], device: Any, dtype: Any, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_any_gpu(monkeypatch)
    assert reason in (KERNEL.why_not(spec, shape, device, dtype) or "")


@pytest.mark.parametrize(
    ("there", "capability", "known", "hip", "reason"),
    [
        (False, (9, 0), True, None, "torch finds no GPU"),
        (True, (7, 5), True, None, "compute capability 7.5, and it needs 8.0"),
        (True, (9, 0), False, None, "packs int4 weights in a layout that is not known here"),
        (True, (9, 0), True, "6.4", "AMD"),
        (True, (8, 0), True, None, None),
    ],
)
def test_the_machine_is_looked_at(
    there: bool, capability: tuple[int, int], known: bool, hip: str | None, reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(cuda_layout, "agrees", lambda _: known)
    found = KERNEL.why_not(QuantSpec(4, 128), (64, 256), CUDA, BF16)
    assert found is None if reason is None else reason in (found or "")


def test_auto_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    on_any_gpu(monkeypatch)
    kernel, refused = choose(QuantSpec(4, 128), (64, 256), CUDA, BF16)
    assert kernel is KERNELS["cuda_int4"]
    assert list(refused) == ["cpu", "cpu_int4", "humming", "gemlite"]
    kernel, refused = choose(QuantSpec(8, 128), (64, 256), CUDA, BF16)
    assert kernel is KERNELS["reference"]
    assert refused["cuda_int4"] == "it takes 4 bits, not 8"
