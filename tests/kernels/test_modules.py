"""PackedLinear as a module: what it says, what it weighs, and that moving it never changes a
number."""

from __future__ import annotations

import copy

import pytest
import torch
from packing import needs_int4, random_weight, shuffled_groups
from torch import nn

from llmquant.errors import UsageError
from llmquant.kernels.packed_linear import PackedLinear, describe, int8_per_token
from llmquant.spec import QuantSpec

BF16 = torch.bfloat16
SPEC = QuantSpec(4, 64, False)
KERNELS = [pytest.param("cpu_int4", marks=needs_int4), "reference", "dense"]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = dict(module.named_buffers())
    return now.keys() == before.keys() and all(
        now[n].dtype == before[n].dtype and torch.equal(now[n], before[n]) for n in now
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_forward_is_the_dequantized_linear(kernel, with_bias):
    weight = random_weight(96, 128, SPEC)
    bias = torch.randn(96) if with_bias else None
    layer = PackedLinear(weight, bias, dtype=BF16, kernel=kernel)
    assert layer.kernel.name == kernel
    assert torch.equal(layer.dequantize(BF16), weight.dequantize(BF16))
    x = torch.randn(2, 3, 128).to(BF16)
    expected = torch.nn.functional.linear(
        x.double(), weight.dequantize().double(), None if bias is None else bias.double()
    )
    # Weight, product, correction and sum are each rounded to bf16 at most once.
    room = (
        4.01
        * 2.0**-8
        * (
            x.double().abs() @ weight.dequantize().double().abs().T
            + (0 if bias is None else bias.abs())
        )
    )
    assert bool(((layer(x).double() - expected).abs() <= room).all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "move",
    [lambda m: m.half(), lambda m: m.float(), lambda m: m.double(), lambda m: m.to(torch.float16)],
    ids=["half", "float", "double", "to"],
)
def test_a_cast_keeps_every_number_or_is_refused(kernel, move):
    layer = PackedLinear(random_weight(64, 128, SPEC), torch.randn(64), dtype=BF16, kernel=kernel)
    before = snapshot(layer)
    if kernel == "reference":
        move(layer)
        assert layer.bias is not None
        assert layer.dtype == layer.bias.dtype != BF16
        x = torch.randn(2, 128, dtype=layer.dtype)
        expected = (
            torch.nn.functional.linear(x, random_weight(64, 128, SPEC).dequantize(layer.dtype))
            + layer.bias
        )
        assert torch.equal(layer(x), expected)
    else:
        with pytest.raises(UsageError, match="load the model with that dtype"):
            move(layer)
        assert layer.dtype == BF16
    assert same(layer, before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.bfloat16(), lambda m: m.eval(), copy.deepcopy],
    ids=["to cpu", "bfloat16", "eval", "deepcopy"],
)  # fmt: skip
def test_a_move_that_changes_nothing_changes_nothing(kernel, move):
    layer = PackedLinear(random_weight(64, 128, SPEC), dtype=BF16, kernel=kernel)
    before = snapshot(layer)
    x = torch.randn(2, 128).to(BF16)
    y = layer(x)
    moved = move(layer)
    assert same(moved, before)
    assert torch.equal(moved(x), y)


@needs_int4
def test_cpu_int4_refuses_another_device():
    layer = PackedLinear(random_weight(64, 128, SPEC), dtype=BF16)
    with pytest.raises(UsageError, match="runs on the CPU"):
        layer.to("meta")


@needs_int4
@pytest.mark.parametrize(
    ("spec", "scale_dtype", "kernel", "expected"),
    [
        # codes, then per group: scale and zero of the operator (4 bytes), shift (1), residual (2)
        # or a second pair (4)
        (QuantSpec(4, 128, True), None, "cpu_int4", 256 * 512 // 2 + 256 * 4 * 4),
        (QuantSpec(4, 128, False), None, "cpu_int4", 256 * 512 // 2 + 256 * 4 * (4 + 1 + 2)),
        (QuantSpec(4, 128, True), torch.float16, "cpu_int4", 256 * 512 // 2 + 256 * 4 * (4 + 4)),
        (QuantSpec(4, 128, True), None, "reference", 256 * 512 // 2 + 256 * 4 * 2),
        (QuantSpec(4, 128, False), None, "reference", 256 * 512 // 2 + 256 * 4 * 3),
        (QuantSpec(3, 128, True), None, "reference", 256 * 512 * 3 // 8 + 256 * 4 * 2),
        (QuantSpec(8, 128, True), None, "reference", 256 * 512 + 256 * 4 * 2),
        (QuantSpec(4, 128, True), None, "dense", 256 * 512 * 2),
    ],
    ids=[
        "int4 sym",
        "int4 asym",
        "int4 fp16 scales",
        "ref sym",
        "ref asym",
        "ref 3 bits",
        "ref 8 bits",
        "dense",
    ],
)
def test_bytes_in_memory_are_counted_to_the_last(spec, scale_dtype, kernel, expected):
    layer = PackedLinear(
        random_weight(256, 512, spec, scale_dtype=scale_dtype), dtype=BF16, kernel=kernel
    )
    assert layer.packed_bytes() == expected
    assert sum(b.untyped_storage().nbytes() for b in layer.buffers()) == expected
    assert list(layer.parameters()) == []


def test_a_g_idx_that_says_nothing_is_dropped():
    trivial = (torch.arange(128) // 64).to(torch.int32)
    plain = PackedLinear(random_weight(64, 128, SPEC, g_idx=trivial), kernel="reference")
    ordered = PackedLinear(
        random_weight(64, 128, SPEC, g_idx=shuffled_groups(128, 2)), kernel="reference"
    )
    assert "g_idx" not in dict(plain.named_buffers())
    assert "g_idx" in dict(ordered.named_buffers())


def test_repr_tells_spec_and_kernel():
    layer = PackedLinear(random_weight(64, 128, SPEC), kernel="reference")
    assert (
        "in_features=128, out_features=64, bias=False, W4 g64 asym, kernel=reference, 4.375 bits"
        in repr(layer)
    )


def test_refused_kernels_are_remembered_and_described():
    model = nn.Sequential(
        PackedLinear(random_weight(64, 128, QuantSpec(8, 64)), dtype=torch.float64),
        nn.Linear(64, 8, bias=False),
        nn.Linear(64, 8, bias=False),
    )
    model[2].weight = model[1].weight
    told = describe(model)
    assert told.kernels == {"reference": 1}
    assert told.refusals == {
        "cpu: it takes float32, bfloat16 and float16, not torch.float64": 1,
        "cpu_int4: it takes 4 bits, not 8": 1,
        "humming: it runs on a GPU, not on cpu": 1,
        "gemlite: it runs on a GPU, not on cpu": 1,
        "cuda_int4: it runs on an NVIDIA GPU, not on cpu": 1,
    }
    assert told.packed_weights == 64 * 128
    assert told.packed_bits_per_weight == 8.25
    assert told.other_bytes == 64 * 8 * 4


def test_int8_activations_are_rounded_as_an_int8_engine_does() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        torch.float32
    )
    x[1] = 0
    scale = x.abs().amax(-1, keepdim=True) / 127
    integers = torch.round(x / torch.where(scale == 0, 1.0, scale))
    assert int(integers.abs().max()) == 127
    assert torch.equal(int8_per_token(x), integers * scale)


def test_a_w8a8_linear_multiplies_rounded_inputs() -> None:
    weight = random_weight(32, 64, QuantSpec(8, None, True))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain = PackedLinear(weight, dtype=torch.float32)
    served = PackedLinear(weight, dtype=torch.float32, activations="int8-dynamic")
    assert torch.equal(served(x), plain(int8_per_token(x)))
    assert not torch.equal(served(x), plain(x))
