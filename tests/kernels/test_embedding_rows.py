"""Rows looked up in packed weights are those of ``dequantize``, bit for bit, with every kernel; a
packed embedding does what ``nn.Embedding`` does."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from packing import needs_int4
from torch import nn

from llmquant.algorithms import rtn
from llmquant.kernels import KERNELS
from llmquant.kernels.embedding.packed_embedding import PackedEmbedding
from llmquant.kernels.packed_linear import PackedLinear, describe
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

TOKENS, WIDTH = 50, 96  # the last tile of 16 rows is not full
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = {"row": None, "g32": 32, "g24": 24}


def drawn(spec: QuantSpec, ordered: bool = False) -> QuantizedWeight:
    numbers = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    weight = rtn(numbers, spec)
    if not ordered:
        return weight
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    g_idx = (order // spec.width(WIDTH)).to(torch.int32)
    return QuantizedWeight(weight.codes, weight.scales, weight.zeros, spec, g_idx)


ON_A_GPU = ("humming", "gemlite", "cuda_int4")
EVERYTHING = [k for k in KERNELS if k not in (*ON_A_GPU, "cpu_int4")]
ALL = [*itertools.product([2, 3, 4, 8], GROUPS, DTYPES, EVERYTHING)]
INT4 = [(4, group, torch.bfloat16, "cpu_int4") for group in ("row", "g32")]  # all that it takes


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "kernel"),
    [*ALL, *(pytest.param(*case, marks=needs_int4) for case in INT4)],
    ids=str,
)
def test_rows_are_those_of_the_dequantized_weight(
    bits: int, group: str, dtype: torch.dtype, kernel: str, symmetric: bool
) -> None:
    spec = QuantSpec(bits, GROUPS[group], symmetric)
    for ordered in (False, group != "row"):
        weight = drawn(spec, ordered)
        packed = PackedLinear(weight, dtype=dtype, kernel=kernel)
        for ids in (
            torch.arange(TOKENS),
            torch.tensor([49, 0, 49, 17, 16, 15]),
            torch.tensor([48]),
        ):
            assert torch.equal(packed.rows(ids), weight.dequantize(dtype)[ids])
        assert packed.rows(torch.tensor([], dtype=torch.int64)).shape == (0, WIDTH)


def table(dtype: torch.dtype = torch.float32) -> PackedLinear:
    return PackedLinear(drawn(QuantSpec(8, None)), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_it_looks_up_as_an_embedding_does(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    packed = PackedEmbedding(table(dtype))
    plain = nn.Embedding(TOKENS, WIDTH, _weight=packed.weight)
    ids = torch.tensor([[3, 49, 0], [16, 16, 31]], dtype=ids_dtype)
    assert torch.equal(packed(ids), plain(ids))
    assert packed(ids[:0]).shape == (0, 3, WIDTH)


@pytest.mark.parametrize("wrong", [-1, TOKENS, TOKENS + 13], ids=["negative", "one more", "many"])
def test_an_id_without_a_row_is_an_error(wrong: int) -> None:
    """Also one that falls into the padding of the last tile."""
    with pytest.raises(IndexError, match=f"{wrong}.*for embeddings of {TOKENS} tokens"):
        PackedEmbedding(table())(torch.tensor([wrong]))


def test_rows_are_scaled_in_their_own_dtype() -> None:
    packed = PackedEmbedding(table(torch.bfloat16), 11.3)
    ids, scale = torch.tensor([5, 6]), torch.tensor(11.3, dtype=torch.bfloat16)
    assert torch.equal(packed(ids), packed.weight[ids] * scale)


def test_a_tied_head_is_the_same_packed_weight_and_counts_once() -> None:
    shared = table()
    model = nn.ModuleDict({"embed": PackedEmbedding(shared), "head": shared})
    for there in (model, copy.deepcopy(model).to(torch.bfloat16)):
        assert there["embed"].table is there["head"]
        found = describe(there)
        assert (found.packed_weights, found.packed_bytes) == (
            TOKENS * WIDTH,
            shared.packed_bytes(),
        )
        assert sum(found.kernels.values()) == 1
        assert found.other_bytes == 0
