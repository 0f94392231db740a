"""Bit packing: its own inverse, its slow twin, and the compressed-tensors library's."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from llmquant.bitpack import pack, pack_slow, unpack, words
from llmquant.errors import FormatError
from llmquant.spec import SUPPORTED_BITS

BITS = pytest.mark.parametrize("bits", SUPPORTED_BITS, ids=lambda b: f"{b} bits")
COUNTS = [1, 2, 7, 8, 9, 10, 11, 31, 32, 33, 63, 64, 65, 96, 100]


def codes_of(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.sampled_from(SUPPORTED_BITS))
    return draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=200)), bits


@given(rows_of_codes())
def test_unpack_undoes_pack_and_pack_is_its_definition(case):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == pack_slow(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@BITS
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_kept(lead, bits):
    codes = codes_of(max(1, torch.Size(lead).numel()), 21, bits).reshape(*lead, 21)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, words(21, bits))
    assert torch.equal(unpack(packed, bits, 21), codes)


@BITS
@pytest.mark.parametrize("count", COUNTS, ids=lambda n: f"n={n}")
def test_equals_compressed_tensors(count, bits):
    codes = codes_of(5, count, bits, seed=count)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, count), codes)
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size((5, count))), signed)


@BITS
def test_a_transposed_view_packs_like_its_copy(bits):
    codes = codes_of(33, 7, bits).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    packed = pack(codes, bits).T.contiguous().T
    assert torch.equal(unpack(packed, bits, 33), codes)


@BITS
def test_unused_bits_are_zero(bits):
    full = torch.full((1, 33), (1 << bits) - 1, dtype=torch.uint8)
    last = int(pack(full, bits)[0, -1]) & 0xFFFFFFFF
    assert last == (1 << (33 * bits % 32)) - 1


@pytest.mark.parametrize(
    ("packed", "bits", "count"),
    [
        pytest.param(torch.zeros(2, 3, dtype=torch.int32), 4, 32, id="a word too many"),
        pytest.param(torch.zeros(2, 1, dtype=torch.int32), 3, 11, id="a word too few"),
        pytest.param(torch.zeros(2, 4, dtype=torch.int64), 4, 32, id="int64"),
    ],
)
def test_a_wrong_number_of_words_is_refused(packed, bits, count):
    with pytest.raises(
        FormatError, match=rf"{count} codes of {bits} bits need {words(count, bits)} int32 words"
    ):
        unpack(packed, bits, count)
