"""The one table of tolerances.

Numeric tests come in three grades that are never mixed. *Exact* ones use ``torch.equal``. *Bounded*
ones use a bound that can be proved: below, from the unit roundoff of a dtype. *Measured* ones name
a unit and a mark.
"""

from __future__ import annotations

import torch

# Unit roundoff: the largest relative error of rounding once to a dtype.
ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}

# Two derivations of the same float64 numbers (explicit elimination, Cholesky) on well-conditioned
# problems of some dozen columns.
TWIN_ATOL = 1e-9


def dot_bound(dtype: torch.dtype, terms: int) -> float:
    """Relative to ``sum |a||b|``: how far a computed dot product of ``terms`` products may be off,
    whatever their order.

    ``n u / (1 - n u)``, Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5.
    """
    nu = terms * ROUNDOFF[dtype]
    return nu / (1 - nu)
