"""Sizes of packed tensors, by packing thin slices: every distinct (scheme, width) is packed by the
real format on 64 and 128 rows of zeros, and since each tensor of every layout grows linearly with
the rows, two sizes give all others.
"""

from __future__ import annotations

import math

import torch

from llmquant.checkpoint.shards import Stored
from llmquant.formats import Format, Scheme
from llmquant.weight import QuantizedWeight

_ROWS = (64, 128)


class Sizes:
    """Shapes of a module's stored tensors, by packing thin slices; each (scheme, width, dtype) is
    packed once."""

    def __init__(self, layout: Format) -> None:
        self.layout = layout
        self._known: dict[tuple[Scheme, int, torch.dtype], list[dict[str, Stored]]] = {}

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Stored]:
        out_features, in_features = shape
        key = (scheme, in_features, dtype)
        if key not in self._known:
            self._known[key] = [self._packed(scheme, rows, in_features, dtype) for rows in _ROWS]
        thin, thick = self._known[key]
        return {
            s: Stored(thin[s].dtype, _grown(thin[s].shape, thick[s].shape, out_features))
            for s in thin
        }

    def nbytes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Of a module's stored tensors, without the shape that some layouts note beside them: what
        bits per weight count."""
        return sum(
            t.nbytes
            for suffix, t in self.tensors(scheme, shape, dtype).items()
            if suffix != "weight_shape"
        )

    def _packed(
        self, scheme: Scheme, rows: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, Stored]:
        spec = scheme.spec
        params = (rows, spec.groups(in_features))
        weight = QuantizedWeight(
            torch.full((rows, in_features), spec.middle, dtype=torch.uint8),
            torch.ones(params),
            torch.full(params, spec.middle, dtype=torch.uint8),
            spec,
            self._order(spec.group_size, in_features) if scheme.g_idx else None,
        )
        packed = self.layout.pack(weight, dtype, scheme.activations)
        return {suffix: Stored(t.dtype, tuple(t.shape)) for suffix, t in packed.items()}

    @staticmethod
    def _order(group_size: int | None, in_features: int) -> torch.Tensor:
        assert group_size is not None
        return (torch.arange(in_features - 1, -1, -1) // group_size).to(torch.int32)


def _grown(thin: tuple[int, ...], thick: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape at ``rows`` rows, each axis linear in the rows through the two measured points."""
    span = _ROWS[1] - _ROWS[0]
    return tuple(
        a + math.ceil((b - a) * (rows - _ROWS[0]) / span) for a, b in zip(thin, thick, strict=True)
    )
