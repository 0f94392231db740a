"""DerivedReader: a checkpoint of which some tensors are made of stored ones, each when it is asked
for.

One expert of a stacked tensor, a matrix in FP8 with its scales, a transposed one: whoever reads
sees a checkpoint of plain matrices, and never holds more than the one that it reads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader, ReaderView
from llmquant.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class Made:
    """How one tensor is made.

    Attributes:
        sources: names in the reader beneath.
        make: of those tensors, in their order, the one that is read.
        shape, dtype: that it has.
        part: of each source only this entry along its first dimension is given to ``make``.
        whole: sources of which ``make`` gets everything, whichever part is asked for.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: int | None = None
    whole: tuple[str, ...] = ()


def rounded(numbers: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Numbers in a dtype, rounded once.

    Raises:
        QuantizationError: one is too large for it; begins with ``where``. NaN and Inf of the
            checkpoint's own are for others to refuse.
    """
    result = numbers.to(dtype)
    if dtype == torch.float16 and bool((~torch.isfinite(result) & torch.isfinite(numbers)).any()):
        raise QuantizationError(
            f"{where} has numbers too large for {dtype}, which config.json names; set dtype to bfloat16 there"
        )
    return result


class DerivedReader(ReaderView):
    """A :class:`CheckpointReader` with made tensors.

    Args:
        inner: the reader beneath.
        made: by name; a stored tensor of this name is no longer seen.
        gone: stored tensors that are no longer seen.
    """

    def __init__(
        self, inner: CheckpointReader, made: Mapping[str, Made], gone: Collection[str] = ()
    ) -> None:
        super().__init__(inner)
        kept = {n: i for n, i in inner.tensors.items() if n not in gone and n not in made}
        infos = {
            name: replace(
                inner.info(one.sources[0]),
                dtype=one.dtype,
                shape=one.shape,
                made=True,
                nbytes=math.prod(one.shape) * one.dtype.itemsize,
            )
            for name, one in made.items()
        }
        self.tensors = kept | infos
        self._made = dict(made)
        self._beneath = {name: name for name in kept}

    def renamed(self, names: Mapping[str, str]) -> CheckpointReader:
        other = copy.copy(self)
        other.tensors = {names.get(n, n): info for n, info in self.tensors.items()}
        other._made = {names.get(n, n): made for n, made in self._made.items()}
        other._beneath = {names.get(n, n): below for n, below in self._beneath.items()}
        assert len(other.tensors) == len(self.tensors)
        return other

    def read(self, name: str) -> Tensor:
        return self._read(name, None)

    def read_part(self, name: str, index: int) -> Tensor:
        return self._read(name, index)

    def _read(self, name: str, index: int | None) -> Tensor:
        self.info(name)  # says so where there is none
        made = self._made.get(name)
        if made is None:
            below = self._beneath[name]
            return self.inner.read(below) if index is None else self.inner.read_part(below, index)
        part = made.part if index is None else index
        assert index is None or made.part is None  # a part of a part
        return made.make(
            *(
                self.inner.read(n)
                if part is None or n in made.whole
                else self.inner.read_part(n, part)
                for n in made.sources
            )
        )
