"""AWQ on a block of a walked model: which pairs there are, the search for each, and the fold into the block.

All searches of a block see the inputs that its *original* weights give; then everything is folded at once, before the first
linear is rounded. Scaled weights are kept in float32 beside the block, and rounding starts from those, never from a rounded copy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.algorithms import AWQOptions, ScaleSearch, search_scale
from llmquant.architectures import Architecture
from llmquant.capture import BlockInput, observe
from llmquant.checkpoint import CheckpointReader
from llmquant.errors import QuantizationError
from llmquant.experts import UNSEEN, place_of
from llmquant.folding import Pair, checked, fold, head_channels, names_of, norm_pairs
from llmquant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class PairReport:
    """What scaling did between a producer of channels and the linears that read them, by full name.

    Attributes:
        ratio: the winning exponent; None where nothing was scaled.
        duo: whether the winner looks at the weights' magnitudes.
        before, after: relative output error of the readers when rounded to nearest; None where no search was made.
        reason: why nothing was scaled, else None.
        seconds: of the search; not part of the manifest.
    """

    producer: str
    readers: tuple[str, ...]
    ratio: float | None = None
    duo: bool = False
    before: float | None = None
    after: float | None = None
    reason: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockScaling:
    """The scaled tensors of a block by full name: float32 weights of linears, and what is written as it is (norms, biases)."""

    weights: Mapping[str, Tensor]
    changed: Mapping[str, Tensor]
    reports: tuple[PairReport, ...]


def scale_block(
    block: nn.Module,
    prefix: str,
    sets: Sequence[tuple[str, ...]],
    specs: Mapping[str, QuantSpec],
    inputs: Sequence[BlockInput],
    reader: CheckpointReader,
    architecture: Architecture,
    kv_heads: int,
    search: ScaleSearch,
    options: AWQOptions,
    all_experts: bool = False,
) -> BlockScaling:
    """Search and fold; the block is changed in place.

    Args:
        block: with its original weights.
        prefix: its full name.
        sets: linears to quantize that share an input, named from the block, in execution order.
        specs: their grids, by full name.
        inputs: the block's inputs.
        reader: the original's tensors.
        architecture: names pairs of linears.
        kv_heads: key-value heads of the model.
        search: the recipe's scale search.
        options: AWQ's.
        all_experts: as for :func:`llmquant.capture.observe`.
    """
    if not sets:
        return BlockScaling({}, {}, ())
    stats = observe(block, {s[0]: _linear(block, s[0]) for s in sets}, inputs, all_experts)
    device = block.get_parameter(f"{sets[0][0]}.weight").device
    tensors: dict[str, Tensor] = {}
    stored: dict[str, torch.dtype] = {}
    touched: set[str] = set()
    reports = []
    for pair, reason in _pairs(block, sets, architecture, kv_heads, inputs[0]):
        start = time.perf_counter()
        names = f"{prefix}.{pair.producer}", tuple(f"{prefix}.{r}" for r in pair.readers)
        if reason is not None:
            reports.append(PairReport(*names, reason=reason))
            continue
        for name in names_of(pair, block):
            if name not in tensors:
                original = reader.read(f"{prefix}.{name}")
                tensors[name], stored[name] = original.to(device, torch.float32), original.dtype
        seen = stats[pair.readers[0]]
        if seen.tokens == 0 and seen.dropped == 0 and place_of(block, pair.readers[0]):
            reports.append(PairReport(*names, reason=UNSEEN))
            continue
        if seen.tokens == 0:
            raise QuantizationError(f"{names[1][0]} saw no finite calibration token ({seen.dropped} dropped)")
        found = search_scale(
            [tensors[f"{r}.weight"] for r in pair.readers], [specs[n] for n in names[1]], seen.hessian, seen.mean_abs, search,
            options, pair.channel, names[1][0],
        )  # fmt: skip
        seconds = time.perf_counter() - start
        why = None if found.ratio is not None else "no scale made the error smaller"
        reports.append(PairReport(*names, found.ratio, found.duo, found.before, found.after, why, seconds))
        if found.ratio is not None:
            changed = fold(pair, found.scale, tensors, stored)
            tensors |= changed
            touched |= changed.keys()
    for name in touched:
        block.get_parameter(name).data.copy_(tensors[name])
    linears = {f"{m}.weight" for s in sets for m in s}
    return BlockScaling(
        {f"{prefix}.{n}": tensors[n] for n in touched & linears},
        {f"{prefix}.{n}": tensors[n].to("cpu", stored[n]) for n in touched - linears},
        tuple(reports),
    )


def _pairs(
    block: nn.Module, sets: Sequence[tuple[str, ...]], architecture: Architecture, kv_heads: int, inputs: BlockInput
) -> list[tuple[Pair, str | None]]:
    """Pairs, each with the reason why it must be left alone, or None."""
    members = {m for s in sets for m in s}
    found: list[tuple[Pair, str | None]] = []
    routed = [m for s in sets if len(s) > 1 and place_of(block, s[0]) for m in s]
    if routed and architecture.experts is not None:
        found.append((Pair(architecture.experts.inside, tuple(routed)), "the router reads these channels too"))
    for pair in norm_pairs(block, sets, inputs):
        found.append(_tried(block, pair, inputs))
    for producer, consumer in architecture.scaled_in([n for n, m in block.named_modules() if isinstance(m, nn.Linear)]):
        missing = [n for n in (producer, consumer) if n not in members]
        pair = Pair(producer, (consumer,), linear=True)
        if missing:
            found.append((pair, f"{missing[0]} is not quantized"))
            continue
        outputs, inward = _linear(block, producer).out_features, _linear(block, consumer).in_features
        if outputs != inward:
            channel = head_channels(outputs, inward, kv_heads)
            if channel is None:
                found.append((pair, f"{outputs} channels of {kv_heads} heads do not make up {inward}"))
                continue
            pair = Pair(producer, (consumer,), channel.to(inputs.hidden.device), linear=True)
        found.append(_tried(block, pair, inputs))
    return found


def _tried(block: nn.Module, pair: Pair, inputs: BlockInput) -> tuple[Pair, str | None]:
    allowed = checked(block, pair, inputs)
    if allowed is None:
        return pair, "folding changes what the block computes: something else reads these channels"
    return allowed, None


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
