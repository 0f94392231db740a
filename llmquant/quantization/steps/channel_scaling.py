"""Channel scaling (AWQ, SmoothQuant) on a block of a walked model: which pairs there are, a search
for each, the fold.

All searches of a block see the inputs that its *original* weights give; then everything is folded
at once, before the first linear is rounded. Scaled weights are kept in float32 beside the block,
and rounding starts from those, never from a rounded copy.

What a good scale is, is a finder's business: :class:`AWQFinder` here,
:class:`llmquant.quantization.steps.smoothquant.SmoothFinder` beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmquant.algorithms import AWQOptions, Scaled, ScaleSearch, search_scale
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import QuantizationError
from llmquant.models.architectures import Architecture
from llmquant.models.block_inputs import BlockInput
from llmquant.models.experts import UNSEEN, place_of
from llmquant.quantization.blocks.capture import observe
from llmquant.quantization.steps.folding import (
    Pair,
    checked,
    fold,
    head_channels,
    names_of,
    norm_pairs,
)
from llmquant.records import PairReport
from llmquant.runtime.distributed import ALONE, World
from llmquant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class BlockScaling:
    """The scaled tensors of a block by full name: float32 weights of linears, and what is written
    as it is (norms, biases)."""

    weights: Mapping[str, Tensor]
    changed: Mapping[str, Tensor]
    reports: tuple[PairReport, ...]


class Finder(Protocol):
    """Finds a pair's factors, given the full names and float32 weights ``[out, in]`` of its
    readers.

    Attributes:
        method: what it is called in reports.
        linears: whether it wants pairs of linears beside those with a norm.
    """

    @property
    def method(self) -> str: ...
    @property
    def linears(self) -> bool: ...
    def unseen(self, pair: Pair) -> bool:
        """Whether no calibration token reached the pair's readers, as happens to experts."""
        ...

    def __call__(self, pair: Pair, names: Sequence[str], weights: Sequence[Tensor]) -> Scaled: ...


class AWQFinder:
    """AWQ's search over the statistics of the block's inputs; see
    :func:`llmquant.algorithms.search_scale`.

    Args:
        block: with its original weights.
        sets: linears to quantize that share an input, named from the block.
        inputs: the block's inputs.
        specs: the linears' grids, by full name.
        search: the recipe's scale search.
        options: AWQ's.
        all_experts: as for :func:`llmquant.quantization.blocks.capture.observe`.
        world: the processes whose inputs count; each must make a finder.
        first_token_share: as for :class:`llmquant.stats.InputStats`.
    """

    method = "awq"
    linears = True

    def __init__(
        self,
        block: nn.Module,
        sets: Sequence[tuple[str, ...]],
        inputs: Sequence[BlockInput],
        specs: Mapping[str, QuantSpec],
        search: ScaleSearch,
        options: AWQOptions,
        all_experts: bool = False,
        world: World = ALONE,
        first_token_share: float = 0.0,
    ) -> None:
        self._stats = observe(
            block, {s[0]: _linear(block, s[0]) for s in sets}, inputs, all_experts,
            first_token_share=first_token_share,
        )  # fmt: skip
        for share in self._stats.values():
            world.all_reduce(share)
        self._specs, self._search, self._options = specs, search, options

    def unseen(self, pair: Pair) -> bool:
        seen = self._stats[pair.readers[0]]
        return seen.tokens == 0 and seen.dropped == 0

    def __call__(self, pair: Pair, names: Sequence[str], weights: Sequence[Tensor]) -> Scaled:
        """The factors that the pair's readers want, or none.

        Raises:
            QuantizationError: no finite calibration token.
        """
        seen = self._stats[pair.readers[0]]
        if seen.tokens == 0:
            raise QuantizationError(
                f"{names[0]} saw no finite calibration token ({seen.dropped} dropped)"
            )
        specs = [self._specs[n] for n in names]
        return search_scale(
            weights,
            specs,
            seen.hessian,
            seen.mean_abs,
            self._search,
            self._options,
            pair.channel,
            names[0],
        )


def scale_block(
    block: nn.Module,
    prefix: str,
    sets: Sequence[tuple[str, ...]],
    inputs: Sequence[BlockInput],
    reader: CheckpointReader,
    architecture: Architecture,
    kv_heads: int,
    find: Finder,
) -> BlockScaling:
    """Search and fold; the block is changed in place.

    Args:
        block: with its original weights.
        prefix: its full name.
        sets: linears to quantize that share an input, named from the block, in execution order; not
            empty.
        inputs: the block's inputs.
        reader: the original's tensors.
        architecture: names pairs of linears.
        kv_heads: key-value heads of the model.
        find: the search.
    """
    tensors = _Tensors(block, prefix, reader)
    touched: set[str] = set()
    reports = []
    wanted = architecture if find.linears else None
    for pair, reason in _pairs(block, sets, wanted, kv_heads, inputs[0]):
        start = time.perf_counter()
        producer, readers = (
            f"{prefix}.{pair.producer}",
            tuple(f"{prefix}.{r}" for r in pair.readers),
        )
        if reason is None:
            tensors.read(names_of(pair, block))
            if place_of(block, pair.readers[0]) and find.unseen(pair):
                reason = UNSEEN
        report = PairReport(producer=producer, readers=readers, reason=reason, method=find.method)
        if reason is not None:
            reports.append(report)
            continue
        best = find(pair, readers, [tensors.values[f"{r}.weight"] for r in pair.readers])
        seconds = time.perf_counter() - start
        why = None if best.ratio is not None else "no scale made the error smaller"
        result = {"ratio": best.ratio, "duo": best.duo, "before": best.before, "after": best.after}
        reports.append(report.model_copy(update={**result, "reason": why, "seconds": seconds}))
        if best.ratio is not None:
            changed = fold(pair, best.scale, tensors.values, tensors.stored)
            tensors.values |= changed
            touched |= changed.keys()
    return tensors.put(touched, {f"{m}.weight" for s in sets for m in s}, tuple(reports))


class _Tensors:
    """Tensors of a block that scaling may change, float32, by their names in the block.

    Attributes:
        values: as they are now.
        stored: the dtypes of the checkpoint.
    """

    def __init__(self, block: nn.Module, prefix: str, reader: CheckpointReader) -> None:
        self._block, self._prefix, self._reader = block, prefix, reader
        self.values: dict[str, Tensor] = {}
        self.stored: dict[str, torch.dtype] = {}

    def read(self, names: Iterable[str]) -> None:
        """Read those that were not read yet."""
        for name in names:
            if name not in self.values:
                original = self._reader.read(f"{self._prefix}.{name}")
                device = self._block.get_parameter(name).device
                self.values[name] = original.to(device, torch.float32)
                self.stored[name] = original.dtype

    def put(
        self, touched: set[str], linears: set[str], reports: tuple[PairReport, ...]
    ) -> BlockScaling:
        """Write what changed into the block."""
        for name in touched:
            self._block.get_parameter(name).data.copy_(self.values[name])
        rest = {n: self.values[n].to("cpu", self.stored[n]) for n in touched - linears}
        return BlockScaling(
            {f"{self._prefix}.{n}": self.values[n] for n in touched & linears},
            {f"{self._prefix}.{n}": value for n, value in rest.items()},
            reports,
        )


def _pairs(
    block: nn.Module,
    sets: Sequence[tuple[str, ...]],
    architecture: Architecture | None,
    kv_heads: int,
    inputs: BlockInput,
) -> list[tuple[Pair, str | None]]:
    """Pairs, each with the reason why it must be left alone, or None; without an ``architecture``
    those with a norm only."""
    members = {m for s in sets for m in s}
    pairs: list[tuple[Pair, str | None]] = []
    routed = [m for s in sets if len(s) > 1 and place_of(block, s[0]) for m in s]
    if routed and architecture is not None and architecture.experts is not None:
        pairs.append(
            (
                Pair(architecture.experts.inside, tuple(routed)),
                "the router reads these channels too",
            )
        )
    for pair in norm_pairs(block, sets, inputs):
        pairs.append(_tried(block, pair, inputs))
    linears = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    for producer, consumer in architecture.scaled_in(linears) if architecture is not None else ():
        missing = [n for n in (producer, consumer) if n not in members]
        pair = Pair(producer, (consumer,), linear=True)
        if missing:
            pairs.append((pair, f"{missing[0]} is not quantized"))
            continue
        outputs, inward = (
            _linear(block, producer).out_features,
            _linear(block, consumer).in_features,
        )
        if outputs != inward:
            channel = head_channels(outputs, inward, kv_heads)
            if channel is None:
                pairs.append(
                    (pair, f"{outputs} channels of {kv_heads} heads do not make up {inward}")
                )
                continue
            pair = Pair(producer, (consumer,), channel.to(inputs.hidden.device), linear=True)
        pairs.append(_tried(block, pair, inputs))
    return pairs


def _tried(block: nn.Module, pair: Pair, inputs: BlockInput) -> tuple[Pair, str | None]:
    allowed = checked(block, pair, inputs)
    if allowed is None:
        return pair, "folding changes what the block computes: something else reads these channels"
    return allowed, None


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
