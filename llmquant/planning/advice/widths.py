"""Which widths are fast on this processor: measured, on one linear of the model's largest shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmquant.kernels import Kernel, Prepared, choose
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, portable

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
        weight = _random_weight((out, in_), spec)
        first = kernel.prepare(weight, dtype)
        count = _copies(sum(t.nbytes for t in first.values()))
        packed = [first, *({n: t.clone() for n, t in first.items()} for _ in range(count - 1))]
        ratios = []
        for rows in (ONE, MANY):
            x = torch.randn(rows, in_)
            call = partial(_linear, kernel, weight, x.to(dtype))
            times = _in_turn(
                [_walking(packed, call)]
                + [
                    _walking(c, partial(torch.nn.functional.linear, x.to(d)))
                    for d, c in copies.items()
                ]
            )
            ratios.append(times[0] / min(times[1:]))
        found[spec] = WidthSpeed(kernel.name, *ratios)
    return found


def _copies(nbytes: int) -> int:
    return max(2, _COLD // nbytes)


def _random_weight(shape: tuple[int, int], spec: QuantSpec) -> QuantizedWeight:
    groups = (shape[0], spec.groups(shape[1]))
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8)
    zeros = torch.full(groups, spec.middle, dtype=torch.uint8)
    return QuantizedWeight(codes, portable(torch.rand(groups) * 0.01 + 0.001), zeros, spec)


def _linear(
    kernel: Kernel, weight: QuantizedWeight, x: torch.Tensor, prepared: Prepared
) -> torch.Tensor:
    return kernel.linear(x, prepared, weight.spec, weight.shape)


def _walking(copies: Sequence[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Each call takes the next copy."""
    state = [0]

    def work() -> object:
        state[0] = (state[0] + 1) % len(copies)
        return call(copies[state[0]])

    return work


def _in_turn(candidates: list[Callable[[], object]]) -> list[float]:
    """Best seconds of each."""
    best = [float("inf")] * len(candidates)
    for work in candidates:
        work()
    end = time.perf_counter() + _SECONDS * len(candidates)
    while time.perf_counter() < end:
        for i, work in enumerate(candidates):
            started = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - started)
    return best
