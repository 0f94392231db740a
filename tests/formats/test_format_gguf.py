"""GGUF blocks against the ``gguf`` package's own dequantizer, exact or refused."""

from __future__ import annotations

import gguf as theirs
import pytest
import torch
from format_cases import same, weight, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.errors import FormatError
from llmquant.formats import gguf as ours
from llmquant.formats.base import Scheme
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

KINDS: tuple[ours.Kind, ...] = ("Q4_0", "Q4_1", "Q8_0")


def by_the_package(data: torch.Tensor, kind: ours.Kind) -> torch.Tensor:
    return torch.from_numpy(
        theirs.quants.dequantize(data.numpy(), theirs.GGMLQuantizationType[kind])
    )


def slow_row(data: list[int], kind: ours.Kind) -> list[float]:
    """One row by the documented formula, a byte at a time."""
    row: list[float] = []
    size = ours.BLOCK_BYTES[kind]
    for start in range(0, len(data), size):
        block = bytes(data[start : start + size])
        d = torch.frombuffer(bytearray(block[:2]), dtype=torch.float16).item()
        if kind == "Q8_0":
            row += [d * (b - 256 if b > 127 else b) for b in block[2:]]
            continue
        nibbles = [b & 15 for b in block[-16:]] + [b >> 4 for b in block[-16:]]
        if kind == "Q4_0":
            row += [d * (q - 8) for q in nibbles]
        else:
            row += [
                d * q + torch.frombuffer(bytearray(block[2:4]), dtype=torch.float16).item()
                for q in nibbles
            ]
    return row


@settings(deadline=None, max_examples=80)
@given(
    w=weights(in_step=32).filter(lambda w: w.g_idx is None and w.spec.width(w.shape[1]) % 32 == 0)
)
def test_the_smallest_type_holds_every_number(w: QuantizedWeight) -> None:
    steps = w.codes.int() - w.zeros.int().repeat_interleave(w.spec.width(w.shape[1]), 1)
    if int(steps.min()) < -128 or int(steps.max()) > 127:
        with pytest.raises(FormatError, match="Q8_0 holds"):
            ours.smallest(w)
        return
    kind = ours.smallest(w)
    data = ours.pack(w, kind)
    assert data.shape == (w.shape[0], w.shape[1] // 32 * ours.BLOCK_BYTES[kind])
    assert torch.equal(by_the_package(data, kind), w.dequantize())
    assert torch.equal(torch.tensor([slow_row(r, kind) for r in data.tolist()]), w.dequantize())
    assert torch.equal(ours.unpack(data, kind).dequantize(), w.dequantize())


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_round_trip(kind: ours.Kind, rows: int, blocks: int, seed: int) -> None:
    spec = QuantSpec(8 if kind == "Q8_0" else 4, 32, kind != "Q4_1")
    w = weight(rows, 32 * blocks, spec, seed=seed)
    if kind == "Q4_1":
        w.zeros.clamp_(max=8)  # times a portable scale, exact in fp16
    data = ours.pack(w, kind)
    assert same(ours.unpack(data, kind), w)
    assert torch.equal(ours.pack(ours.unpack(data, kind), kind), data)


def one_group(scale: float, zero: int, bits: int = 4) -> QuantizedWeight:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).reshape(1, 32)
    scales, zeros = torch.tensor([[scale]]), torch.tensor([[zero]], dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, QuantSpec(bits, 32, False))


@pytest.mark.parametrize(
    ("scale", "zero", "kind"),
    [
        (1.0, 8, "Q4_0"),
        (1.0, 11, "Q4_1"),
        (255 / 128, 7, "Q4_1"),
        (255 / 128, 9, "Q8_0"),
        (2.0**-14, 15, "Q4_1"),
        (2.0**13, 9, "Q8_0"),
    ],
    ids=["centred", "round scale", "fits 11 bits", "needs 12 bits", "small", "overflows fp16"],
)
def test_which_type(scale: float, zero: int, kind: ours.Kind) -> None:
    w = one_group(scale, zero)
    assert ours.smallest(w) == kind
    assert torch.equal(by_the_package(ours.pack(w, kind), kind), w.dequantize())


@pytest.mark.parametrize(
    ("w", "kind", "message"),
    [
        (one_group(1.0, 3), "Q4_0", "-8 … 7"),
        (one_group(255 / 128, 9), "Q4_1", "would round 1 of 1 groups; use Q8_0"),
        (one_group(1.0 + 2.0**-12, 8), "Q4_0", "not exact in float16"),
        (weight(4, 64, QuantSpec(8, 32, False)), "Q8_0", "Q8_0 holds -128 … 127"),
        (weight(4, 64, QuantSpec(8, 32, False)), "Q4_1", "0 … 15"),
        (weight(4, 48, QuantSpec(4, 24)), "Q4_0", "a scale for every 24"),
        (weight(4, 48, QuantSpec(4, None)), "Q4_0", "a scale for every 48"),
        (weight(4, 64, QuantSpec(4, 32), g_idx=True), "Q4_0", "no g_idx"),
    ],
    ids=["range", "minimum", "scale", "8-bit asym", "codes", "group", "row", "g_idx"],
)
def test_refused_rather_than_rounded(w: QuantizedWeight, kind: ours.Kind, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ours.pack(w, kind)


def test_why_not_knows_before_the_numbers() -> None:
    assert "activations" in str(
        ours.why_not(Scheme(QuantSpec(8, None), activations="int8-dynamic"), (32, 64))
    )
    assert ours.why_not(Scheme(QuantSpec(3, 96)), (8, 192)) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_what_the_package_quantizes_is_read(kind: ours.Kind) -> None:
    dense = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    data = torch.from_numpy(
        theirs.quants.quantize(dense.numpy(), theirs.GGMLQuantizationType[kind])
    )
    assert torch.equal(ours.unpack(data, kind).dequantize(), by_the_package(data, kind))


def test_a_minimum_off_the_grid_is_refused() -> None:
    dense = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    data = torch.from_numpy(theirs.quants.quantize(dense.numpy(), theirs.GGMLQuantizationType.Q4_1))
    with pytest.raises(FormatError, match="no integer grid"):
        ours.unpack(data, "Q4_1")


@pytest.mark.parametrize("shape", [(2, 19), (36,), (2, 0)], ids=["size", "rank", "empty"])
def test_rows_that_are_no_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="blocks"):
        ours.unpack(torch.zeros(shape, dtype=torch.uint8), "Q4_0")
