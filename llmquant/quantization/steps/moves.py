"""Moves of powers of two between the tensors of a block: whether one is needed, how far it goes,
and that it is exact. :mod:`llmquant.quantization.steps.rescaling` says why;
:mod:`llmquant.quantization.steps.exchanges` says where a power may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.quantization.steps.exchanges import Exchange
from llmquant.records import PairReport
from llmquant.weight import times_power_of_two

METHOD = "power-of-two"
# A linear whose middle row gets a scale outside these is out of range.
_LOW, _HIGH = 2.0**-14, 2.0**15
# A row counts if it and its columns weigh more together than this share of what most do.
_COUNTS = 2.0**-6
# Powers of two by which a row has to be off, and its columns the other way, to be moved.
_FAR = 4


@dataclass(slots=True)
class _Power:
    """What a tensor is multiplied with: exponents of its rows (of a vector: its elements) and of
    its columns."""

    rows: Tensor | int = 0
    columns: Tensor | int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The product, in the tensor's dtype."""
        exponent = torch.as_tensor(self.rows)
        if tensor.ndim > 1:
            exponent = exponent.reshape(-1, 1) + torch.as_tensor(self.columns)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return times_power_of_two(wide, exponent.to(torch.int32)).to(tensor.dtype)

    def is_exact(self, tensor: Tensor) -> bool:
        back = _Power(-self.rows, -self.columns).of(self.of(tensor))
        return torch.equal(back, tensor)


@dataclass(slots=True)
class Moved:
    """One block, or what is behind the last: its changes by full name, and what is said of them."""

    powers: dict[str, _Power] = field(default_factory=dict)
    reports: list[PairReport] = field(default_factory=list)


class Moves:
    """The moves of one block, each made on what those before it left.

    Args:
        reader: of the checkpoint as it is.
        prefix: the block's full name, or "".
        codes: the largest code of a linear by full name, 0 where it is not quantized.
    """

    def __init__(self, reader: CheckpointReader, prefix: str, codes: Callable[[str], int]) -> None:
        self.made = Moved()
        self._inner, self._prefix, self._codes = reader, prefix, codes
        self._largest: dict[str, Tensor] = {}

    def _name(self, module: str) -> str:
        return f"{self._prefix}.{module}".lstrip(".")

    def _rows(self, module: str) -> Tensor:
        """Float64 ``[out]``: the largest magnitude of each row as it is now."""
        name = f"{self._name(module)}.weight"
        if module not in self._largest:
            self._largest[module] = _largest(self._now(name), 1)
        return self._largest[module]

    def _now(self, name: str) -> Tensor:
        tensor, power = self._inner.read(name), self.made.powers.get(name)
        return tensor if power is None else power.of(tensor)

    def _scales(self, module: str, rows: Tensor) -> Tensor:
        """What min-max would give rows of these magnitudes; all 0 where nothing is quantized."""
        codes = self._codes(self._name(module))
        return rows * (2 / codes) if codes else torch.zeros_like(rows)

    def _outside(self, module: str, rows: Tensor) -> bool:
        middle = _middle(self._scales(module, rows))
        return middle > 0 and not _LOW <= middle <= _HIGH

    def out_of_norm(self, norm: str, readers: Sequence[str]) -> None:
        """Bring a norm's weight near 1 where that brings what reads it into range."""
        weight = f"{self._name(norm)}.weight"
        if weight not in self._inner or not readers:
            return
        middles = [_middle(self._scales(r, self._rows(r))) for r in readers]
        known = [m for m in middles if m > 0]
        if not known or all(_LOW <= m <= _HIGH for m in known):
            return
        size = _middle(self._inner.read(weight).abs().to(torch.float64))
        power = round(math.log2(size)) if size > 0 else 0
        # Small readers can only take from a large norm, and large ones give to a small one.
        if power == 0 or (power > 0) != (min(known) < _LOW):
            return
        vectors = [n for n in (weight, f"{self._name(norm)}.bias") if n in self._inner]
        changes = {n: _Power(rows=-power) for n in vectors}
        changes |= {f"{self._name(r)}.weight": _Power(rows=power) for r in readers}
        self._make(changes, norm, readers)

    def between(self, exchange: Exchange) -> None:
        """Bring single rows of a producer to their columns of its reader as the others are to
        theirs, then make the sizes of both equal where one of them is out of range."""
        producer, reader = exchange.producer, exchange.reader
        if exchange.channel is not None:
            self._single_rows(exchange, exchange.channel)
        rows = producer.of(self._rows(producer.module))
        others = reader.of(self._rows(reader.module))
        small, large = _middle(rows), _middle(others)
        if small <= 0 or large <= 0:
            return
        if self._outside(producer.module, rows) or self._outside(reader.module, others):
            power = round((math.log2(large) - math.log2(small)) / 2)
            self._exchange(exchange, torch.full_like(rows, power, dtype=torch.int64))

    def _single_rows(self, exchange: Exchange, channel: Tensor) -> None:
        modules = (exchange.producer.module, exchange.reader.module)
        if not any(self._codes(self._name(m)) for m in modules):
            return
        rows = exchange.producer.of(self._rows(modules[0]))
        columns = torch.zeros_like(rows).scatter_reduce_(
            0, channel, _largest(self._now(f"{self._name(modules[1])}.weight"), 0), "amax"
        )
        together = rows * columns
        if not bool(torch.isfinite(together).all()):
            return
        counts = together > _COUNTS * _middle(together)
        if not bool(counts.any()):
            return
        ratio = torch.where(counts, columns.log2() - rows.log2(), 0.0)
        power = ((ratio - ratio[counts].median()) / 2).round()
        power = torch.where(counts, power, 0.0).to(torch.int64)
        if int(power.abs().max()) >= _FAR:
            self._exchange(exchange, power)

    def _exchange(self, exchange: Exchange, power: Tensor) -> None:
        """Multiply the producer's rows by ``2**power`` and divide what reads them."""
        if not bool(power.any()):
            return
        producer, reader = exchange.producer, exchange.reader
        module = self._name(producer.module)
        up = _scattered(power, producer.rows, self._rows(producer.module))
        changes = {
            n: _Power(rows=up) for n in (f"{module}.weight", f"{module}.bias") if n in self._inner
        }
        other = self._name(reader.module)
        if exchange.channel is not None:
            changes[f"{other}.weight"] = _Power(columns=-power[exchange.channel])
        else:
            # A part of the same tensor where queries and keys are one matrix.
            same = reader.module == producer.module
            down = _scattered(
                -power[0].expand(reader.of(self._rows(reader.module)).numel()),
                reader.rows,
                self._rows(reader.module),
            )
            for leaf in ("weight", "bias"):
                if f"{other}.{leaf}" in self._inner:
                    changes[f"{other}.{leaf}"] = _Power(rows=up + down if same else down)
        self._make(changes, producer.module, [reader.module])

    def _make(self, changes: dict[str, _Power], producer: str, readers: Iterable[str]) -> None:
        """Note the changes if every one of them is exact."""
        powers = {}
        for name, change in changes.items():
            before = self.made.powers.get(name, _Power())
            powers[name] = _Power(before.rows + change.rows, before.columns + change.columns)
            if not powers[name].is_exact(self._inner.read(name)):
                return
        self.made.powers |= powers
        for name in changes:
            self._largest.pop(name.removeprefix(f"{self._prefix}.").removesuffix(".weight"), None)
        names = tuple(self._name(r) for r in readers)
        self.made.reports.append(
            PairReport(producer=self._name(producer), readers=names, method=METHOD)
        )


def _largest(weight: Tensor, dim: int) -> Tensor:
    """The largest magnitude along a dimension, float64."""
    return torch.maximum(weight.amax(dim), -weight.amin(dim)).to(torch.float64)


def _middle(values: Tensor) -> float:
    """The median of those that are not 0; 0 where all are. Infinite ones are for whoever rounds the
    tensor to refuse."""
    there = values[(values > 0) & torch.isfinite(values)]
    return float(there.median()) if there.numel() else 0.0


def _scattered(power: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Exponents of some rows as those of all."""
    if rows is None:
        return power
    return torch.zeros(like.numel(), dtype=torch.int64).index_copy_(0, rows, power.clone())
