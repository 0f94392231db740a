"""What each linear costs at each scheme: one pass through the model, from which a size budget can
be spent well.

Linears are taken in *items*: those that engines fuse stand together, every other alone. For each
item and scheme the pass rounds the original weights as the run itself would (GPTQ with the item's
Hessian, or to nearest) and knows two numbers. The *layer error* is GPTQ's objective, ``tr(D H
D^T)`` per token with ``D = W - Q``: exact and cheap, known for every scheme, but in a unit of that
layer's output, so it compares schemes of one item and never two items. The *damage* compares items:

``kl``     divergence of the whole model's next-token distribution from the original's, in nats
           per token, with only this item rounded. Needs the whole model in memory, and runs of the
           blocks after the item.
``block``  change of the block's output, ``mean_t |dy_t|^2 / |y_t|^2``. Needs one block in memory.
           It does not know how much the rest of the model minds, so it predicts less well
           (docs/mixed-precision.md has the figures).

Damage is measured once per item and width of at most four bits, at the scheme whose layer error is
the median of its width. The others of that width follow by the ratio of their layer errors, since
both measures are quadratic in a small ``D``; so does the 8-bit damage, which would drown in the
noise of a low-precision run.

Statistics are those of the original model: items are judged one by one, with everything before them
unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import QuantizationError
from llmquant.models.architectures import blocks_of, norm_of
from llmquant.models.block_inputs import BlockInput, first_inputs
from llmquant.planning.allocation.options import Kind
from llmquant.planning.allocation.quality_loss import (
    Damage,
    anchors_of,
    divergence,
    interpolate,
    relative_error,
)
from llmquant.planning.allocation.trial_rounding import TrialRounding
from llmquant.quantization.blocks.capture import observe, stages
from llmquant.quantization.blocks.materialize import materialized, outer_names
from llmquant.quantization.blocks.whole_model import already_run, swapped, whole
from llmquant.quantization.plan import Progress, WalkPlan, batched
from llmquant.spec import QuantSpec
from llmquant.stats import InputStats
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Item:
    """Linears that get one scheme, and the schemes to judge. ``block`` is None for the head."""

    block: int | None
    names: tuple[str, ...]
    specs: tuple[QuantSpec, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """How damage is measured: the kind, and the windows ``[positions]`` on which."""

    kind: Kind
    windows: Sequence[Tensor]


def measure(
    plan: WalkPlan,
    items: Mapping[int, Item],
    windows: Sequence[Tensor],
    probe: Probe,
    on_progress: Callable[[Progress], None],
) -> Iterator[tuple[int, dict[QuantSpec, Damage]]]:
    """The number of each item, block by block, and the damage of each of its schemes.

    Args:
        plan: the model, where its tensors are, device and dtype; its recipe says how to round.
            ``specs`` is not used.
        items: of the model's blocks and head, by a number of the caller's.
        windows: calibration token ids for the statistics, each ``[positions]``.
        probe: how the damage is measured.
        on_progress: called before each item.

    Raises:
        QuantizationError: NaN or Inf where there must be none.
        CheckpointError: a tensor of the model is missing from the checkpoint.
    """
    if not items:
        return
    blocks = blocks_of(plan.model, plan.architecture)
    with ExitStack() as resident:
        if probe.kind == "kl":
            resident.enter_context(whole(plan))
        run = _Pass(plan, probe, windows, on_progress)
        for index in range(len(blocks)):
            mine = {i: item for i, item in items.items() if item.block == index}
            yield from run.block(index, blocks[index], mine)
        for i, item in items.items():
            if item.block is None:
                yield i, run.head(item)


class _Pass:
    """The state between blocks: what goes into the next one, for the statistics and for the
    probe."""

    def __init__(
        self,
        plan: WalkPlan,
        probe: Probe,
        windows: Sequence[Tensor],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.plan, self.kind, self._on_progress = plan, probe.kind, on_progress
        self.blocks = blocks_of(plan.model, plan.architecture)
        self.ids = [w.unsqueeze(0).to(plan.device) for w in probe.windows]
        batches = [b.to(plan.device) for b in batched(windows, plan.recipe.calibration.batch_size)]
        with ExitStack() as outer:
            if self.kind == "block":
                outer.enter_context(materialized(plan, plan.model, "", outer_names(plan)))
            self.inputs = first_inputs(plan.model, self.blocks, batches)
            self.probes = first_inputs(plan.model, self.blocks, self.ids)
        # What the block before gave for each probe window, in whatever form this model's blocks
        # give it.
        self.given: list[Any] = [None] * len(self.ids)

    def block(
        self, index: int, block: nn.Module, items: Mapping[int, Item]
    ) -> Iterator[tuple[int, dict[QuantSpec, Damage]]]:
        """Each item's number and damages, then on to the next block."""
        prefix = f"{self.plan.architecture.blocks}.{index}."
        with ExitStack() as resident:
            if self.kind == "block":
                resident.enter_context(materialized(self.plan, block, prefix))
            linears = {
                n: _linear(block, n.removeprefix(prefix))
                for item in items.values()
                for n in item.names
            }
            hessians = self._observe(block, linears, prefix)
            for i, item in items.items():
                self._on_progress(Progress(index, len(self.blocks), item.names[0]))
                here = {n: linears[n] for n in item.names}
                yield i, self._judge(item, here, hessians, index, block)
            self._advance(block, index)

    def head(self, item: Item) -> dict[QuantSpec, Damage]:
        """The head's damage; ``block`` takes the relative error of the logits."""
        (name,) = item.names
        norm, head = (
            norm_of(self.plan.model, self.plan.architecture),
            self.plan.model.get_output_embeddings(),
        )
        assert isinstance(head, nn.Linear)
        with ExitStack() as resident:
            if self.kind == "block":
                resident.enter_context(
                    materialized(self.plan, norm, f"{self.plan.architecture.norm}.")
                )
                resident.enter_context(materialized(self.plan, head, f"{name}."))
            share = self.plan.first_token_share
            stats = InputStats(head.in_features, self.plan.device, first_token_share=share)
            with torch.no_grad():
                for batch in self.inputs:
                    stats.add(norm(batch.hidden))
            self._on_progress(Progress(len(self.blocks), len(self.blocks), name))
            return self._judge(item, {name: head}, {name: stats}, len(self.blocks), None)

    def _observe(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], prefix: str
    ) -> dict[str, InputStats]:
        """Statistics of every linear, one object per shared input."""
        if not linears:
            return {}
        by_leaf = {n.removeprefix(prefix): m for n, m in linears.items()}
        everything = self.plan.all_experts
        sets = stages(block, by_leaf, self.inputs[0], everything)
        stats = observe(
            block, {s[0]: by_leaf[s[0]] for s in sets}, self.inputs, everything,
            first_token_share=self.plan.first_token_share,
        )  # fmt: skip
        return {f"{prefix}{leaf}": stats[s[0]] for s in sets for leaf in s}

    def _judge(
        self,
        item: Item,
        linears: Mapping[str, nn.Linear],
        stats: Mapping[str, InputStats],
        index: int,
        block: nn.Module | None,
    ) -> dict[QuantSpec, Damage]:
        originals = {
            n: self.plan.reader.read(f"{n}.weight").to(self.plan.device, torch.float32)
            for n in item.names
        }
        rounding = TrialRounding(self.plan, originals, stats)
        # Rounded weights are made, judged and dropped; those that will be measured are made again,
        # which costs less than keeping every scheme of a large item.
        layer = {spec: rounding.error(rounding(spec)) for spec in item.specs}
        anchors = anchors_of(layer)
        if block is None and self.kind == "block":
            return interpolate(
                layer,
                {a: layer[a] / rounding.energy if rounding.energy > 0 else 0.0 for a in anchors},
            )
        return interpolate(layer, self._damage(linears, {a: rounding(a) for a in anchors}, index))

    def _damage(
        self,
        linears: Mapping[str, nn.Linear],
        rounded: Mapping[QuantSpec, Mapping[str, QuantizedWeight]],
        index: int,
    ) -> dict[QuantSpec, float]:
        """The mean damage over all positions of all probe windows, for each scheme."""
        run, difference = (
            (self._logits, divergence)
            if self.kind == "kl"
            else (self._block_output, relative_error)
        )
        values: dict[QuantSpec, list[Tensor]] = {spec: [] for spec in rounded}
        for i in range(len(self.ids)):
            reference = run(i, index)
            for spec, weights in rounded.items():
                with swapped(linears, weights, self.plan.dtype):
                    values[spec].append(difference(reference, run(i, index)))
        means = {spec: float(torch.cat(parts).mean()) for spec, parts in values.items()}
        if not all(math.isfinite(m) for m in means.values()):
            raise QuantizationError(
                f"{next(iter(linears))}: the model gave NaN or Inf on the calibration text at {self.plan.dtype}; "
                "use --dtype float32"
            )
        return {spec: max(mean, 0.0) for spec, mean in means.items()}

    def _block_output(self, i: int, index: int) -> Tensor:
        return _hidden(_raw_output(self.blocks[index], self.probes[i]))

    def _logits(self, i: int, index: int) -> Tensor:
        """The whole model's logits ``[1, positions, vocabulary]`` with the blocks before ``index``
        taken as already run."""
        with already_run(self.blocks, index, self.given[i]), torch.no_grad():
            logits: Tensor = self.plan.model(input_ids=self.ids[i], use_cache=False).logits
        return logits

    def _advance(self, block: nn.Module, index: int) -> None:
        self.inputs = [
            b.after(self._finite(_hidden(_raw_output(block, b)), index)) for b in self.inputs
        ]
        self.given = [_raw_output(block, b) for b in self.probes]
        self.probes = [
            b.after(_hidden(raw)) for b, raw in zip(self.probes, self.given, strict=True)
        ]

    def _finite(self, hidden: Tensor, index: int) -> Tensor:
        if not bool(torch.isfinite(hidden).all()):
            raise QuantizationError(
                f"block {index} gave NaN or Inf on the calibration text at {self.plan.dtype}; use --dtype float32"
            )
        return hidden


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _raw_output(block: nn.Module, inputs: BlockInput) -> Any:
    args, kwargs = inputs.calls[0]
    with torch.no_grad():
        return block(inputs.hidden, *args, **kwargs)


def _hidden(raw: Any) -> Tensor:
    hidden: Tensor = raw[0] if isinstance(raw, (tuple, list)) else raw
    return hidden


__all__ = [
    "Damage",
    "Item",
    "Probe",
    "anchors_of",
    "divergence",
    "interpolate",
    "measure",
    "relative_error",
]
