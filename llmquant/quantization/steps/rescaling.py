"""A checkpoint seen with powers of two moved between its layers, where scales would otherwise leave
what fp16 holds.

Rows of ``up`` divided by 4096 and columns of ``down`` multiplied by it are the same model, and so
are all its like. Rounding does not see a power of two either, but fp16 does: below 2**-14 it has
fewer bits for a scale, and below 2**-24 none. So before a block is read, the size of its linears'
rows is looked at. Where the scales that they will get are out of range, a power of two is moved as
:mod:`llmquant.quantization.steps.exchanges` allows: out of a norm's weight, until that is near 1;
between two linears, until their sizes are equal; and for single rows, until they are to their
columns what the others are to theirs.

Every product is exact in the checkpoint's dtype, or the move is not made: what is read is the same
function, bit for bit, and whoever reads through :class:`RescaledReader` (calibration, rounding,
copying, proof) sees one model. Where nothing is out of range or far off nothing is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.models.architectures import Architecture
from llmquant.quantization.steps.exchanges import (
    Exchange,
    block_of,
    exchanges_of,
    last_norm,
    norms_of,
)
from llmquant.recipe import Recipe
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
class _Block:
    """One block, or what is behind the last: its changes by full name, and what is said of them."""

    powers: dict[str, _Power] = field(default_factory=dict)
    reports: list[PairReport] = field(default_factory=list)


class RescaledReader(CheckpointReader):
    """A :class:`CheckpointReader` whose tensors give scales that fp16 holds, where powers of two
    can be moved to get there.

    Args:
        reader: the checkpoint, rotated or not.
        architecture: the model's.
        recipe: says which linears are quantized, and to how many codes.

    Attributes:
        inner: the reader given.
    """

    def __init__(
        self, reader: CheckpointReader, architecture: Architecture, recipe: Recipe
    ) -> None:
        vars(self).update(vars(reader))
        self.inner = reader
        self._kind = str(self.config.get("model_type"))
        self._architecture, self._recipe = architecture, recipe
        self._found: dict[str, _Block] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, multiplied by the powers of two that were moved into it."""
        tensor = self.inner.read(name)
        power = self._block(self._place(name)).powers.get(name)
        return tensor if power is None else power.of(tensor)

    def moved(self, block: str | None) -> tuple[PairReport, ...]:
        """What was moved in a block, by its full name, or (None) between the last norm and the
        head."""
        return tuple(self._block(block or "").reports)

    def _place(self, name: str) -> str | None:
        """The block of a tensor, "" for what is behind the last, None elsewhere."""
        inside = block_of(name, self._architecture)
        if inside is not None:
            return inside[0]
        behind = (f"{self._architecture.norm}.", f"{self._architecture.head}.")
        return "" if name.startswith(behind) else None

    def _block(self, prefix: str | None) -> _Block:
        if prefix is None:
            return _Block()
        if prefix not in self._found:
            self._found[prefix] = self._looked_at(prefix)
        return self._found[prefix]

    def _looked_at(self, prefix: str) -> _Block:
        moves = _Moves(self, prefix, self._codes)
        if not prefix:
            norm, head = last_norm(self._kind, self._architecture, self.tensors), self._head()
            if norm is not None and head is not None:
                moves.out_of_norm(norm, [head])
            return moves.made
        shapes = {
            n.removeprefix(f"{prefix}.").removesuffix(".weight"): info.shape
            for n, info in self.tensors.items()
            if n.startswith(f"{prefix}.") and n.endswith(".weight") and len(info.shape) == 2
        }
        if not any(self._codes(f"{prefix}.{n}") for n in shapes):
            return moves.made
        for norm, readers in norms_of(self._kind, self.config, shapes).items():
            moves.out_of_norm(norm, readers)
        for exchange in exchanges_of(self._kind, self._architecture, self.config, shapes):
            moves.between(exchange)
        return moves.made

    def _head(self) -> str | None:
        """The head, where it has a weight of its own."""
        head = self._architecture.head
        tied = self.config.get("tie_word_embeddings")
        return None if tied or f"{head}.weight" not in self.tensors else head

    def _codes(self, name: str) -> int:
        """The largest code of a linear's grid; 0 where it is not quantized."""
        names = (name,) if name != self._architecture.head else (name, "lm_head")
        recipe = self._recipe
        return recipe.weights_of(*names).spec.max_code if recipe.selects(*names) else 0


class _Moves:
    """The moves of one block, each made on what those before it left.

    Args:
        reader: of the checkpoint.
        prefix: the block's full name, or "".
        codes: the largest code of a linear by full name, 0 where it is not quantized.
    """

    def __init__(self, reader: RescaledReader, prefix: str, codes: Callable[[str], int]) -> None:
        self.made = _Block()
        self._inner, self._prefix, self._codes = reader.inner, prefix, codes
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
    """The median of those that are not 0; 0 where all are."""
    there = values[values > 0]
    return float(there.median()) if there.numel() else 0.0


def _scattered(power: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Exponents of some rows as those of all."""
    if rows is None:
        return power
    return torch.zeros(like.numel(), dtype=torch.int64).index_copy_(0, rows, power.clone())
