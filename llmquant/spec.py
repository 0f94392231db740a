"""QuantSpec: which integers a weight may become, and nothing else.

A spec is a uniform affine grid: ``w = (code - zero) * scale`` with ``code`` in ``0 … 2**bits - 1``
and one ``(scale, zero)`` pair per ``group_size`` consecutive input columns of one output row.
``group_size=None`` means one pair per row (compressed-tensors calls it *channel*, GPTQ writes
``-1``).

Symmetric means the zero-point is pinned to the middle code ``2**(bits-1)``, so signed codes run
``-2**(bits-1) … 2**(bits-1) - 1`` around 0. It says nothing of how codes are found, stored or
multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llmquant.errors import SpecError

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A uniform affine integer grid for one weight matrix ``[out, in]``.

    Raises:
        SpecError: for a width other than 2, 3, 4, 8 or a group size that is not positive.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise SpecError(
                f"bits={self.bits} is not supported; choose one of {', '.join(map(str, SUPPORTED_BITS))}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(
                f"group_size={self.group_size} must be a positive divisor of the input width, "
                "or None (-1 on the command line) for one group per row"
            )

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def max_code(self) -> int:
        return self.levels - 1

    @property
    def middle(self) -> int:
        """The zero-point of a symmetric spec, ``2**(bits-1)``."""
        return self.levels // 2

    def groups(self, in_features: int) -> int:
        """Groups per row of a weight with ``in_features`` columns. Call :meth:`check` first for a
        named error."""
        return 1 if self.group_size is None else in_features // self.group_size

    def width(self, in_features: int) -> int:
        """Columns that share one scale."""
        return in_features if self.group_size is None else self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether rows of ``in_features`` columns fall into whole groups."""
        return self.group_size is None or in_features % self.group_size == 0

    def check(
        self,
        in_features: int,
        module: str,
        others: Iterable[int] = (),
        *,
        g_idx: bool = False,
        otherwise: str = "",
    ) -> None:
        """Refuse a group size that does not divide ``in_features``; name the module and the sizes
        that do.

        Args:
            in_features: columns of the module's weight.
            module: to be named.
            others: columns of the linears that get the same group size; the sizes that are named
                divide these too.
            g_idx: whether columns are stored with the numbers of their groups, which a whole row
                has none of.
            otherwise: what can be done in place of another size; default: to ignore the module.

        Raises:
            SpecError: naming ``module`` and the divisors that would work.
        """
        if self.divides(in_features):
            return
        common = math.gcd(in_features, *others)
        fits = [str(g) for g in range(8, min(common, 1024) + 1) if common % g == 0]
        nearest = ", ".join(fits) or "none of 8 or more"
        static = " (with act-order static)" if g_idx else ""
        raise SpecError(
            f"{module}: group_size={self.group_size} does not divide its {in_features} input columns; "
            f"sizes that do: {nearest}, or -1 for one group per row{static}. Choose one of them, or "
            f"{otherwise or f'--ignore {module}'}"
        )

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight: codes, plus one scale (and a packed zero-point if asymmetric) per
        group."""
        extra = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + extra / self.width(in_features)

    def __str__(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"
