"""Rotations are orthogonal, are what their dense twins are, and cover the widths that models
have."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch

from llmquant.algorithms.hadamard import (
    Rotation,
    hadamard_factors,
    hadamard_rotation,
    random_rotation,
)
from llmquant.errors import SpecError

KINDS = {"hadamard": hadamard_rotation, "random": random_rotation}


def dense(rotation: Rotation) -> torch.Tensor:
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


@pytest.mark.parametrize(
    "order", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 76, 80, 96, 128, 576, 960]
)
def test_factors_make_a_hadamard_matrix(order):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(order):
        matrix = torch.kron(matrix, factor)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert bool((matrix[:, 0] == 1).all())


@pytest.mark.parametrize(
    "width",
    [
        *(896, 1024, 1536, 2048, 2560, 2880, 3072, 3584, 4096, 5120, 6144, 8192),
        *(pytest.param(n, marks=pytest.mark.long) for n in (11008, 14336)),
    ],
)
def test_the_widths_of_models_have_one(width):
    assert math.prod(f.shape[0] for f in hadamard_factors(width)) == width


@pytest.mark.parametrize("order", [0, 3, 6, 10, 14, 52, 92])
def test_an_order_without_one_is_refused(order):
    with pytest.raises(SpecError, match=f"no Hadamard matrix of order {order} is known"):
        hadamard_factors(order)


@pytest.mark.parametrize("keep_mean", [False, True], ids=["any", "keeps the mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 12, 32, 256, 384])
def test_a_rotation_is_orthogonal_and_depends_on_its_seed(kind, size, keep_mean):
    q = dense(KINDS[kind](size, 1, keep_mean))
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(q, dense(KINDS[kind](size, 1, keep_mean)))
    if size > 2:
        assert not torch.allclose(q, dense(KINDS[kind](size, 2, keep_mean)))
        assert float(q.abs().max()) < 0.95  # no channel is left as it was
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(ones @ q, ones, atol=1e-12) == keep_mean


@pytest.mark.parametrize("size", [64, 512])
def test_the_fast_product_is_the_dense_one(size):
    x = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = hadamard_rotation(size, 3)
    signs = (
        torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    )
    twin = x * signs @ torch.from_numpy(scipy.linalg.hadamard(size, dtype=float)) / math.sqrt(size)
    assert torch.allclose(rotation.apply(x), twin, atol=1e-12, rtol=0)
    assert torch.allclose(
        rotation.apply_to_rows(x[0].T), dense(rotation).T @ x[0].T, atol=1e-12, rtol=0
    )
