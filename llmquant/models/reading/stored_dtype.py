"""A checkpoint seen in the dtype that its result is stored in.

A quantized folder holds more than codes: scales, embeddings, the head, norms. They take the
checkpoint's dtype, and of a float32 checkpoint they would take float32: twice the bytes of
everything that is not quantized, and a dtype that serving engines round away when they load. So a
checkpoint that is mostly float32 is stored in bfloat16 by default, which has its range; a
checkpoint of 16 bits stays what it is, byte for byte, the odd float32 tensor included.

:class:`StoredReader` rounds tensor by tensor as it is read, so that calibration, copying and proof
see the numbers that are stored. The weights that will be quantized are read in full
(:meth:`StoredReader.in_full`): codes are chosen from what the checkpoint has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader, ReaderView
from llmquant.errors import QuantizationError
from llmquant.runtime.devices import AUTO, parse_dtype

SOURCE = "source"
DEFAULT = torch.bfloat16
_WIDE = (torch.float32, torch.float64)
# What models compute in float32 by their own code, whatever the rest is in.
_KEPT = re.compile(r"(e_score_correction_bias|inv_freq|A_log)$")


def as_stored(
    reader: CheckpointReader,
    wanted: str = AUTO,
    carried: Collection[str] = (),
    kept: Callable[[str], bool] = lambda name: False,
) -> CheckpointReader:
    """The checkpoint as it is stored; the same reader where nothing changes.

    Args:
        reader: of an unquantized checkpoint.
        wanted: ``auto`` (16 bits where the checkpoint has more), ``source``, or a dtype.
        carried: tensors that go along as they are read, since the model has no place for them.
        kept: whether the model wants a tensor in float32 whatever the rest is in.

    Raises:
        UsageError: no such dtype.
    """
    if wanted == SOURCE:
        return reader
    if wanted != AUTO:
        dtype = parse_dtype(wanted).dtype
    elif _is_wide(reader):
        dtype = DEFAULT
    else:
        return reader
    names = [
        name
        for name, info in reader.tensors.items()
        if info.dtype.is_floating_point
        and info.dtype != dtype
        and not (_KEPT.search(name) or kept(name))
        and name not in carried
    ]
    return StoredReader(reader, dtype, names) if names else reader


def _is_wide(reader: CheckpointReader) -> bool:
    """Whether most numbers are float32 or longer."""
    floats = [i for i in reader.tensors.values() if i.dtype.is_floating_point]
    wide = sum(math.prod(i.shape) for i in floats if i.dtype in _WIDE)
    return 2 * wide > sum(math.prod(i.shape) for i in floats)


class StoredReader(ReaderView):
    """A :class:`CheckpointReader` whose tensors ``names`` have another dtype.

    Attributes:
        inner: the reader beneath.
        dtype: that they have.
        names: those tensors; ``info`` gives their new dtype, ``read`` rounds once to it.
    """

    def __init__(
        self,
        inner: CheckpointReader,
        dtype: torch.dtype,
        names: Collection[str],
        full: Collection[str] = (),
    ) -> None:
        super().__init__(inner)
        self.dtype, self.names = dtype, names
        self._full = frozenset(full)
        size = dtype.itemsize
        self.tensors = dict(inner.tensors) | {
            n: replace(i, dtype=dtype, nbytes=math.prod(i.shape) * size)
            for n in names
            for i in (inner.info(n),)
        }
        self._rounded = frozenset(names) - self._full
        keys = [k for k in ("dtype", "torch_dtype") if k in inner.config] or ["dtype"]
        name = str(dtype).removeprefix("torch.")
        self.config = {**inner.config, **dict.fromkeys(keys, name)}

    def in_full(self, names: Collection[str]) -> StoredReader:
        """The same, but ``read`` gives these as the checkpoint has them: scales and codes are made
        of them, and ``info`` says in which dtype those are stored."""
        return StoredReader(self.inner, self.dtype, self.names, names)

    def read(self, name: str) -> Tensor:
        """One tensor, rounded once.

        Raises:
            QuantizationError: a number is too large for the dtype.
        """
        tensor = self.inner.read(name)
        if name not in self._rounded:
            return tensor
        rounded = tensor.to(self.dtype)
        # NaN and Inf of the checkpoint's own are for others to refuse.
        if bool((~torch.isfinite(rounded) & torch.isfinite(tensor)).any()):
            raise QuantizationError(
                f"{self.path}: tensor {name} has numbers too large for {self.dtype}; give --store-dtype bfloat16 or float32"
            )
        return rounded

    def note(self) -> str:
        """For people: what is stored in another dtype than it had."""
        before = sorted({str(self.inner.info(n).dtype).removeprefix("torch.") for n in self.names})
        return (
            f"{self.path} is in {', '.join(before)}; scales and what is not quantized are stored in "
            f"{str(self.dtype).removeprefix('torch.')} (--store-dtype source keeps {'it' if len(before) == 1 else 'them'})"
        )
