"""Orthogonal matrices that spread a vector's channels: Hadamard matrices with random signs, or
random ones.

A Hadamard matrix of order ``n`` has entries +-1 and orthogonal rows. Orders that are powers of two
are Sylvester's (scipy has them); Paley's two constructions over the integers modulo a prime give
12, 20, 28, 36, 44, 60 … and a Kronecker product with Sylvester's any of those times a power of two,
which covers the widths of the usual models (1536 = 12 * 128, 3584 = 28 * 128, 5120 = 20 * 256).
Kept as its small factors, such a matrix multiplies a row of ``n`` numbers with some ``n * (factor +
factor …)`` operations.

Everything is float64. Row vectors throughout: :meth:`Rotation.apply` is ``x @ Q``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import scipy.linalg
import torch
from torch import Tensor

from llmquant.errors import SpecError

_SLICE_ELEMENTS = 1 << 22
_LARGEST_FACTOR = 64


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal ``[size, size]`` matrix as a product of steps, each signs ``[size]`` or the
    factors of a Kronecker product.

    Attributes:
        name: for reports.
    """

    name: str
    size: int
    steps: tuple[Tensor | tuple[Tensor, ...], ...]

    def apply(self, x: Tensor) -> Tensor:
        """``x @ Q`` for ``x`` of any float dtype ``[..., size]``, in float64; rows go in slices of
        bounded size."""
        rows = x.reshape(-1, self.size)
        out = torch.empty(rows.shape, dtype=torch.float64, device=x.device)
        step = max(1, _SLICE_ELEMENTS // self.size)
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step].to(torch.float64)
            for matrix in self.steps:
                part = (
                    part * matrix.to(x.device)
                    if isinstance(matrix, Tensor)
                    else _times_kronecker(part, matrix)
                )
            out[start : start + step] = part
        return out.reshape(x.shape)

    def apply_to_rows(self, weight: Tensor) -> Tensor:
        """``Q^T @ weight`` for ``[size, columns]``: a linear whose outputs are to come out
        rotated."""
        return self.apply(weight.T).T.contiguous()


def _times_kronecker(rows: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """``rows @ (F0 (x) F1 (x) …)``, one factor after another."""
    before = rows.shape[0]
    for factor in factors:
        size = factor.shape[0]
        rows = torch.einsum("bia,ij->bja", rows.reshape(before, size, -1), factor.to(rows.device))
        before *= size
    return rows.reshape(-1, math.prod(f.shape[0] for f in factors))


def hadamard_rotation(size: int, seed: int, keep_mean: bool = False) -> Rotation:
    """``diag(signs) H / sqrt(size)``; with ``keep_mean`` ``H diag(1, signs) H^T / size``, which
    leaves ``(1, …, 1)`` where it is.

    Raises:
        SpecError: no Hadamard matrix of this order is known here.
    """
    factors = hadamard_factors(size)
    signs = torch.randint(0, 2, (size,), generator=_generator(seed)).to(torch.float64) * 2 - 1
    whole = tuple(f / math.sqrt(f.shape[0]) for f in factors)
    name = f"hadamard {'x'.join(str(f.shape[0]) for f in factors)}"
    if not keep_mean:
        return Rotation(name, size, (signs, whole))
    signs[0] = 1  # the first column of every factor is all ones
    return Rotation(name, size, (whole, signs, tuple(f.T for f in whole)))


def random_rotation(size: int, seed: int, keep_mean: bool = False) -> Rotation:
    """A uniformly random orthogonal matrix; with ``keep_mean`` one of those that leave ``(1, …,
    1)`` where it is."""
    name = f"random {size}"
    if not keep_mean:
        return Rotation(name, size, ((_haar(size, seed),),))
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), _haar(size - 1, seed))
    normal = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    normal[0] += 1
    # The reflection that swaps the first axis and the direction of (1, …, 1).
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(
        normal, normal
    ) / normal.square().sum().clamp(min=1e-300)
    return Rotation(name, size, ((mirror @ inner @ mirror,),))


def _haar(size: int, seed: int) -> Tensor:
    factored = torch.linalg.qr(
        torch.randn(size, size, generator=_generator(seed), dtype=torch.float64)
    )
    signs: Tensor = factored.R.diagonal().sign()
    orthogonal: Tensor = factored.Q
    return orthogonal * signs  # without the signs the distribution is not uniform


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Matrices with entries +-1 and a first column of ones, whose Kronecker product is a Hadamard
    matrix of the order.

    Raises:
        SpecError: none is known here.
    """
    core = order // (order & -order) if order > 0 else 0
    while core and order % core == 0 and not _constructible(core):
        core *= 2
    if not core or order % core:
        raise SpecError(
            f"no Hadamard matrix of order {order} is known here; use residual: random, or heads: false for heads"
        )
    power, sizes = order // core, [core] if core > 1 else []
    while power > 1:
        sizes.append(min(power, _LARGEST_FACTOR))
        power //= sizes[-1]
    return tuple(_hadamard(s) for s in sizes or [1])


def _constructible(order: int) -> bool:
    return order in (1, 2) or _paley(order) is not None


def _paley(order: int) -> tuple[int, bool] | None:
    """The prime of a Paley construction of the order, and whether it is the second."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1, False
    half = order // 2
    return (
        (half - 1, True) if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1) else None
    )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@cache
def _hadamard(order: int) -> Tensor:
    if order & (order - 1) == 0:
        return torch.from_numpy(scipy.linalg.hadamard(order, dtype=float))
    found = _paley(order)
    assert found is not None
    prime, second = found
    squares = {i * i % prime for i in range(1, prime)}
    character = [0, *(1 if i in squares else -1 for i in range(1, prime))]
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = 1 if second else -1
    core[1:, 1:] = torch.tensor(
        [[character[(i - j) % prime] for j in range(prime)] for i in range(prime)]
    )
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if second:
        plus, minus = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(),
        )
        matrix = torch.kron(core, plus) + torch.kron(identity, minus)
    else:
        matrix = core + identity
    return matrix * matrix[:, :1]
