"""Int4Operator: a kernel over one of torch's int4 operators for few rows, and a matrix product over
the dequantized weight for many, from the same bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels.base import Prepared
from llmquant.kernels.int4.parameters import (
    exact_scales,
    operator_group,
    parameters_of,
    why_not_numbers,
)
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


class Int4Operator(ABC):
    """What both operators share. 4 bits, bfloat16, groups of a multiple of 32.

    Buffers: ``packed`` in the operator's layout; what
        :func:`~llmquant.kernels.int4.parameters.parameters_of` says;
    ``columns`` int64 ``[in]`` if columns are sorted by group.
    """

    name: str
    any_dtype = False
    rounds_inputs = False
    runs_on: tuple[str, str]
    """The type of its device, and that in words."""
    crossover: int
    """Rows from which :meth:`_many` is taken."""

    @abstractmethod
    def _why_not_here(self, device: torch.device) -> str | None:
        """Why the operator cannot be run on a device of its type, or None."""

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """uint8 codes ``[out, in]`` → the operator's layout."""

    @abstractmethod
    def _unpack(self, packed: Tensor) -> Tensor:
        """The inverse: uint8 ``[rows, in]``, rows of padding included."""

    @abstractmethod
    def _padded(self, out_features: int) -> int:
        """Rows as stored."""

    @abstractmethod
    def _block(self) -> int:
        """Rows that are stored together."""

    @abstractmethod
    def _take(self, packed: Tensor, blocks: Tensor) -> Tensor:
        """Those blocks of rows of a packed weight."""

    @abstractmethod
    def _operator(self) -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
        """torch's operator: x bf16 ``[M, in]``, packed, group size, scales and zeros →
        ``[M, rows]``."""

    @abstractmethod
    def _many(self, x: Tensor, prepared: Prepared) -> Tensor:
        """``[M, in]`` in the stored order → ``[M, rows]`` by a matrix product."""

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        width, (kind, words) = spec.width(shape[1]), self.runs_on
        if device.type != kind:
            return f"it runs on {words}, not on {device}"
        if spec.bits != 4:
            return f"it takes 4 bits, not {spec.bits}"
        if dtype is not torch.bfloat16:
            return f"torch's int4 operator takes torch.bfloat16, not {dtype}"
        if operator_group(width) is None:
            return f"groups of {width} columns are not a multiple of 32"
        return self._why_not_here(device)

    def why_not_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        return why_not_numbers(weight)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        codes, buffers = weight.codes, {}
        if weight.g_idx is not None:
            buffers["columns"] = torch.argsort(weight.g_idx, stable=True)
            codes = codes[:, buffers["columns"]]
        buffers["packed"] = self._pack(codes)
        return buffers | parameters_of(weight, self._padded(codes.shape[0]))

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        if x.dtype is not torch.bfloat16:
            raise UsageError(
                f"kernel {self.name} was loaded for bfloat16 activations but got {x.dtype}; load with that dtype"
            )
        out_features, in_features = shape
        rows = x.reshape(-1, in_features)
        columns = prepared.get("columns")
        rows = rows.contiguous() if columns is None else rows.index_select(1, columns)
        few = rows.shape[0] < self.crossover
        y = self._few(rows, prepared) if few else self._many(rows, prepared)
        if y.shape[1] != out_features:
            y = y[:, :out_features].contiguous()
        return y.view(*x.shape[:-1], out_features)

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        columns = prepared.get("columns")
        weight = self._dequantized(prepared, torch.float32)[: shape[0]].to(dtype)
        return (
            weight if columns is None else torch.empty_like(weight).index_copy_(1, columns, weight)
        )

    def _dequantized(self, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """The weight ``[rows, in]`` in the stored order of columns, rows of padding included.

        Args:
            dtype: of the arithmetic; it holds the scales exactly. Integers up to 15 are exact in
                any, so that the one rounding is that of the product.
        """
        packed, shift = prepared["packed"], prepared.get("shift")
        assert packed is not None
        scales = exact_scales(prepared).to(dtype)
        codes = self._unpack(packed).to(dtype).sub_(8)
        groups = scales.shape[0]
        grouped = codes.view(codes.shape[0], groups, codes.shape[1] // groups)
        if shift is not None:
            grouped.add_(shift.T.unsqueeze(-1).to(dtype))
        return grouped.mul_(scales.T.unsqueeze(-1)).view(codes.shape)

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        # Rows are packed in blocks, so the blocks that the ids are in are unpacked, each once.
        block, packed = self._block(), prepared["packed"]
        assert packed is not None
        blocks, which = torch.unique(ids // block, return_inverse=True)
        within = torch.arange(block, device=ids.device)
        taken = (blocks.unsqueeze(-1) * block + within).flatten()
        picked = {
            n: t if t is None or n == "columns" else t[:, taken]
            for n, t in prepared.items()
            if n != "packed"
        }
        picked["packed"] = self._take(packed, blocks)
        weight = self.weight(picked, spec, (len(taken), shape[1]), torch.float32)
        return weight[which * block + ids % block]

    def _few(self, x: Tensor, prepared: Prepared) -> Tensor:
        """``[M, in]`` → ``[M, rows]`` by the int4 operator, plus what its bf16 parameters could not
        hold."""
        packed, high = prepared["packed"], prepared["scales_and_zeros"]
        assert packed is not None
        assert high is not None
        operator, groups = self._operator(), high.shape[0]
        width = x.shape[1] // groups
        y = operator(x, packed, width, high)
        residual, low = prepared.get("residual"), prepared.get("low")
        if residual is not None:
            y = torch.addmm(y, x.view(-1, groups, width).sum(-1), residual)
        elif low is not None:
            y += operator(x, packed, width, low)
        return y
