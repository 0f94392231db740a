"""Which widths are fast on this processor: measured, on one linear of the model's largest shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from llmquant.kernels import Kernel, Prepared, choose
from llmquant.planning.advice.in_turn import in_turn, random_weight, walking
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

ONE, MANY = 1, 256  # rows: a token that is decoded, a part of a prompt
_SECONDS = 0.2  # for each candidate
_COLD = 64 << 20  # bytes of copies that are walked through, so that weights come from memory
_MOST = 4096  # rows and columns of the measured linear


@dataclass(frozen=True, slots=True)
class WidthSpeed:
    """A packed linear beside the faster of the dense float32 and bfloat16 ones, in parts of its
    time: 0.5 is twice as fast.

    Attributes:
        one_row: a decoded token.
        many_rows: of a prompt.
    """

    kernel: str
    one_row: float
    many_rows: float


def measure_widths(
    shape: tuple[int, int], specs: Iterable[QuantSpec], dtype: torch.dtype
) -> Mapping[QuantSpec, WidthSpeed]:
    """Time packed and dense linears of one shape on the CPU, in turn.

    Args:
        shape: ``(out, in)``; more than 4096 of either are not measured.
        dtype: of the activations of packed layers.
    """
    out, in_ = (min(size, _MOST) for size in shape)
    found: dict[QuantSpec, WidthSpeed] = {}
    dense = torch.randn(out, in_)
    copies = {
        d: [dense.to(d).clone() for _ in range(_copies(dense.nbytes * d.itemsize // 4))]
        for d in (torch.float32, torch.bfloat16)
    }
    for spec in dict.fromkeys(specs):
        kernel, _ = choose(spec, (out, in_), torch.device("cpu"), dtype)
        weight = random_weight((out, in_), spec)
        first = kernel.prepare(weight, dtype)
        count = _copies(sum(t.nbytes for t in first.values()))
        packed = [first, *({n: t.clone() for n, t in first.items()} for _ in range(count - 1))]
        ratios = []
        for rows in (ONE, MANY):
            x = torch.randn(rows, in_)
            call = partial(_linear, kernel, weight, x.to(dtype))
            work = {"packed": walking(packed, call)}
            work |= {
                str(d): walking(c, partial(torch.nn.functional.linear, x.to(d)))
                for d, c in copies.items()
            }
            times = in_turn(work, _SECONDS)
            ratios.append(times.pop("packed") / min(times.values()))
        found[spec] = WidthSpeed(kernel.name, *ratios)
    return found


def _copies(nbytes: int) -> int:
    return max(2, _COLD // nbytes)


def _linear(
    kernel: Kernel, weight: QuantizedWeight, x: torch.Tensor, prepared: Prepared
) -> torch.Tensor:
    return kernel.linear(x, prepared, weight.spec, weight.shape)
