"""Every kernel that takes a weight against ``torch.nn.functional.linear`` (cuBLAS) over dense
bfloat16 of the same shape, for many numbers of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from clock import copies, replayed
from torch import Tensor

from llmquant.kernels import KERNELS, Kernel
from llmquant.planning.advice.in_turn import random_weight
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

LLAMA_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
LLAMA_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))
ROWS = tuple(1 << i for i in range(13))
TUNED_ROWS = (1, 16, 512, 4096)
"""For a package that tunes itself anew for every number of rows, which takes seconds each."""
TUNES_ITSELF = ("gemlite",)
FAST_ROWS, FAST, SLOWEST = 16, 3.3, 0.95
"""The goal: with up to FAST_ROWS rows FAST times as fast as cuBLAS, and nowhere below SLOWEST."""
LEFT_OUT = ("dense", "cpu_int8")


@dataclass(frozen=True)
class Setting:
    """What is measured where."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    cold: int
    names: tuple[str, ...] = tuple(n for n in KERNELS if n not in LEFT_OUT)


@dataclass(frozen=True)
class Job:
    """One width and shape, with every kernel and these numbers of rows."""

    spec: QuantSpec
    shape: tuple[int, int]
    rows: tuple[int, ...] = ROWS


def all_jobs() -> list[Job]:
    """Those that decide come first, should time run out: a package compiles for every shape."""
    usual, zeros, wide = QuantSpec(4, 128), QuantSpec(4, 128, False), QuantSpec(8, 128)
    first = [Job(usual, shape) for shape in (*LLAMA_8B, *LLAMA_70B)]
    others = [Job(spec, shape) for shape in LLAMA_8B for spec in (zeros, wide)]
    return first[:4] + others[:2] + first[4:] + others[2:]


@dataclass(frozen=True)
class Packed:
    """A weight, and as many copies in a kernel's layout as are cold."""

    weight: QuantizedWeight
    copies: list[dict[str, Tensor]]

    @classmethod
    def of(
        cls, setting: Setting, kernel: Kernel, spec: QuantSpec, shape: tuple[int, int]
    ) -> Packed:
        with setting.device:
            weight = random_weight(shape, spec)
        first = kernel.prepare(weight, setting.dtype)
        count = copies(sum(t.nbytes for t in first.values()), setting.cold)
        more = [{n: t.clone() for n, t in first.items()} for _ in range(count - 1)]
        return cls(weight, [first, *more])


class Products:
    """The cells that were measured, and why others were not."""

    def __init__(self, setting: Setting, in_time: Callable[[], bool]) -> None:
        self.setting, self.in_time = setting, in_time
        self.cells: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}
        self.not_measured = 0
        self._packed: dict[str, Packed] = {}
        self._dense: dict[tuple[int, int], list[Tensor]] = {}

    def measure(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Jobs in order; cells for which no time is left are counted."""
        for job in jobs:
            dense: dict[int, float] = {}
            for name, rows in itertools.product(self.setting.names, job.rows):
                if name in TUNES_ITSELF and rows in ROWS and rows not in TUNED_ROWS:
                    continue
                if self.in_time() and rows not in dense:
                    dense[rows] = self._dense_seconds(job.shape, rows)
                self._tried(name, job.spec, job.shape, rows, dense.get(rows, 0.0))
            self._packed.clear()
        return {
            "cells": self.cells, "refused": self.refused, "not_measured": self.not_measured,
            "goals": goals(self.cells),
        }  # fmt: skip

    def _tried(
        self, name: str, spec: QuantSpec, shape: tuple[int, int], rows: int, dense: float
    ) -> None:
        label = f"{name} {spec} {list(shape)}"
        if label in self.refused:
            return
        if not self.in_time():
            self.not_measured += 1
            return
        device, dtype = self.setting.device, self.setting.dtype
        reason = KERNELS[name].why_not(spec, shape, device, dtype)
        if reason is not None:
            self.refused[label] = reason
            return
        try:
            cell = self._cell(KERNELS[name], spec, shape, rows, dense)
        except (AssertionError, RuntimeError, ValueError) as e:  # of a package, kept as a result
            self.refused[label] = f"{type(e).__name__}: {e}"
            return
        self.cells.append(cell)
        print(f"{label:44} {rows:5} rows: {cell['speedup']:.2f} of dense", flush=True)

    def _cell(
        self, kernel: Kernel, spec: QuantSpec, shape: tuple[int, int], rows: int, dense: float
    ) -> dict[str, Any]:
        """The product is checked before it is timed."""
        key = f"{kernel.name} {spec} {shape}"
        if key not in self._packed:
            self._packed[key] = Packed.of(self.setting, kernel, spec, shape)
        packed = self._packed[key]
        x = drawn((rows, shape[1]), self.setting)
        error = relative_error(kernel.linear(x, packed.copies[0], spec, shape), x, packed.weight)
        calls = [partial(kernel.linear, x, prepared, spec, shape) for prepared in packed.copies]
        found = replayed(calls, self.setting.device, self.setting.seconds)
        nbytes = sum(t.nbytes for t in packed.copies[0].values())
        return {
            "kernel": kernel.name, "spec": str(spec), "shape": list(shape), "rows": rows,
            "seconds": found, "dense_seconds": dense, "speedup": dense / found,
            "packed_bytes_per_second": nbytes / found, "relative_error": error,
        }  # fmt: skip

    def _dense_seconds(self, shape: tuple[int, int], rows: int) -> float:
        if shape not in self._dense:
            nbytes = shape[0] * shape[1] * self.setting.dtype.itemsize
            count = copies(nbytes, self.setting.cold)
            self._dense[shape] = [drawn(shape, self.setting) for _ in range(count)]
        x = drawn((rows, shape[1]), self.setting)
        calls = [partial(torch.nn.functional.linear, x, w) for w in self._dense[shape]]
        calls[0]()
        return replayed(calls, self.setting.device, self.setting.seconds)


def drawn(shape: tuple[int, int], setting: Setting) -> Tensor:
    return torch.randn(shape, device=setting.device, dtype=setting.dtype)


def relative_error(y: Tensor, x: Tensor, weight: QuantizedWeight) -> float:
    """``|y - x w| / |x w|`` in Frobenius norms, of float32's product."""
    exact = x.float() @ weight.dequantize().T
    return float((y.float() - exact).norm() / exact.norm())


def goals(records: list[dict[str, Any]]) -> dict[str, Any]:
    """For each width the slowest cell of the fastest kernel, held against the goal."""
    best: dict[tuple[str, str, int], float] = {}
    for r in records:
        key = (r["spec"], str(r["shape"]), r["rows"])
        best[key] = max(best.get(key, 0.0), r["speedup"])
    found = {}
    for spec in dict.fromkeys(r["spec"] for r in records):
        few = [v for (s, _, m), v in best.items() if s == spec and m <= FAST_ROWS]
        every = [v for (s, _, _), v in best.items() if s == spec]
        found[spec] = {
            "slowest_of_few_rows": min(few, default=None), "slowest": min(every),
            "kept": min(few, default=FAST) >= FAST and min(every) >= SLOWEST,
        }  # fmt: skip
    return found
