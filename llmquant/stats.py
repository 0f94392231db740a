"""InputStats: what a linear's calibration inputs leave behind, in one matrix.

GPTQ needs ``H = X^T X`` over all calibration tokens; activation-weighted scale search needs its
diagonal; AWQ needs mean magnitudes. All are sums over tokens, so they accumulate batch by batch and
merge across devices by addition, and linears that share an input share one object. Rows holding NaN
or Inf would poison every entry: they are counted and left out.

The first token of a window can count for more in ``H``. It is what later tokens look at when they
need to look at nothing (the attention sink, arXiv:2309.17453), so an error in it reaches them all,
and yet it is one row in thousands. RSQ (arXiv:2503.01820) weighs tokens by the attention they get;
here it is by the place alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.errors import QuantizationError

_WIDE, _BLOCKS = (
    256,
    4,
    # from this width on; measured at 256 to 4096 with AVX2: 0.62 to 0.71 of the time of the whole
    # product
)


class InputStats:
    """Sums over calibration tokens of one input of width ``in_features``.

    Args:
        first_token_share: of activations ``[windows, positions, in]`` the first position counts in
            the Hessian as this share of the window's positions, and at least as one; 0: as any
            other. Activations ``[tokens, in]`` (an expert's) have no positions.

    Attributes:
        hessian: float32 ``[in, in]``, the sum of ``x x^T`` (no factor 2, not divided by the count).
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        first_token_share: float = 0.0,
    ) -> None:
        self._first_token_share = first_token_share
        self.hessian = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._abs_sum = torch.zeros(in_features, dtype=dtype, device=device)
        self._rows = 0
        self._dropped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def in_features(self) -> int:
        return self.hessian.shape[0]

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The accumulators themselves: what is added up, in place, over processes."""
        return self.hessian, self._abs_sum

    def add(self, x: Tensor) -> None:
        """Accumulate activations ``[..., in]`` of any float dtype.

        Raises:
            QuantizationError: activations of another width.
        """
        if x.shape[-1] != self.in_features:
            raise QuantizationError(
                f"activations {list(x.shape)} do not have {self.in_features} channels"
            )
        rows = x.reshape(-1, self.in_features)
        if not _known_finite(rows):
            (rows,) = self._only_finite(rows)
        self._add_rows(rows, self._weights(x))

    def _add_rows(self, rows: Tensor, weights: Tensor | None) -> None:
        """Finite rows ``[tokens, in]``, each with its weight in the Hessian ``[tokens, 1]``."""
        rows = rows.to(self.hessian.dtype)
        self._rows += rows.shape[0]
        self._abs_sum += rows.abs().sum(dim=0)
        _add_gram(self.hessian, rows if weights is None else rows * weights.sqrt())

    def _weights(self, x: Tensor) -> Tensor | None:
        """How much each row of activations counts, ``[tokens, 1]``; None: all the same."""
        first = self._first_token_share * x.shape[1] if x.dim() == 3 else 0.0
        if first <= 1:
            return None
        weights = torch.ones(*x.shape[:2], 1, dtype=self.hessian.dtype, device=x.device)
        weights[:, 0] = first
        return weights.reshape(-1, 1)

    def _only_finite(self, *sides: Tensor) -> list[Tensor]:
        """The rows, those with NaN or Inf on any side as zeros, which add nothing to a sum; they
        are counted."""
        finite = torch.stack([torch.isfinite(rows).all(dim=1) for rows in sides]).all(dim=0)
        self._dropped += (~finite).sum()
        return [torch.where(finite.unsqueeze(1), rows, 0.0) for rows in sides]

    def set_counts(self, tokens: int, dropped: int) -> None:
        """Say how many rows the sums are of: after they were added up over processes."""
        self._rows = tokens + dropped
        self._dropped.fill_(dropped)

    def merge(self, other: InputStats) -> None:
        """Add another accumulator of the same width (another device's share of the tokens)."""
        if other.in_features != self.in_features:
            raise QuantizationError(
                f"cannot merge statistics of widths {self.in_features} and {other.in_features}"
            )
        self.hessian += other.hessian.to(self.hessian.device)
        self._abs_sum += other._abs_sum.to(self._abs_sum.device)
        self._rows += other._rows
        self._dropped += other._dropped.to(self._dropped.device)

    @property
    def dropped(self) -> int:
        """Rows left out because they held NaN or Inf."""
        return int(self._dropped)

    @property
    def tokens(self) -> int:
        """Rows added."""
        return self._rows - self.dropped

    @property
    def mean_abs(self) -> Tensor:
        """``[in]`` mean magnitude of each channel."""
        return self._abs_sum / max(self.tokens, 1)

    @property
    def importance(self) -> Tensor:
        """``[in]`` mean square of each channel: the Hessian's diagonal per token."""
        return self.hessian.diagonal() / max(self.tokens, 1)


def _known_finite(values: Tensor) -> bool:
    """Whether all are finite, where that can be asked without waiting for a device. One pass: a sum
    of finite values that overflows only sends them to the closer look."""
    if values.device.type != "cpu":
        return False
    return bool(values.sum(dtype=torch.float32).isfinite())


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """``total += rows^T rows``, by blocks of columns from the diagonal down; the rest is mirrored:
    two thirds of the time."""
    width = -(-total.shape[0] // _BLOCKS) if total.shape[0] >= _WIDE else total.shape[0]
    for start in range(0, total.shape[0], width):
        total[start:, start : start + width].addmm_(
            rows[:, start:].T, rows[:, start : start + width]
        )
    for start in range(0, total.shape[0], width):
        end = start + width
        total[start:end, end:] = total[end:, start:end].T


class PairStats(InputStats):
    """Input statistics that also remember what the original model would have read in the same
    places.

    Attributes:
        cross: float32 ``[in, in]``, the sum of ``f x^T`` for inputs ``x`` and the original model's
            inputs ``f``.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        first_token_share: float = 0.0,
    ) -> None:
        super().__init__(in_features, device, dtype, first_token_share)
        self.cross = torch.zeros_like(self.hessian)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return *super().sums, self.cross

    def add_pair(self, x: Tensor, original: Tensor) -> None:
        """Accumulate inputs and the original model's, both ``[..., in]``; a row not finite in
        either is left out.

        Raises:
            QuantizationError: activations of another width, or of different shapes.
        """
        if x.shape != original.shape:
            raise QuantizationError(
                f"inputs {list(x.shape)} and the original model's {list(original.shape)} do not pair up"
            )
        rows = x.reshape(-1, x.shape[-1])
        beside = original.reshape(-1, x.shape[-1])
        if not (_known_finite(rows) and _known_finite(beside)):
            rows, beside = self._only_finite(rows, beside)
        weights = self._weights(x)
        self._add_rows(rows, weights)
        rows = rows.to(self.cross.dtype)
        rows = rows if weights is None else rows * weights
        self.cross.addmm_(beside.to(self.cross.dtype).T, rows)

    def merge(self, other: InputStats) -> None:
        """Add another accumulator of pairs of the same width."""
        if not isinstance(other, PairStats):
            raise QuantizationError("statistics of pairs merge only with statistics of pairs")
        super().merge(other)
        self.cross += other.cross.to(self.cross.device)
