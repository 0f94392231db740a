"""The walk of a recipe that needs text: each block is run on the calibration windows, and every
linear gets the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import CheckpointError, QuantizationError
from llmquant.models.architectures import blocks_of, norm_of
from llmquant.models.block_inputs import first_inputs, run_block
from llmquant.models.experts import passes_of
from llmquant.quantization.blocks.calls import Calls
from llmquant.quantization.blocks.capture import BatchContext, no_context, observe, stages
from llmquant.quantization.blocks.hidden_states import StateStore
from llmquant.quantization.blocks.inputs import STREAM, Inputs
from llmquant.quantization.blocks.materialize import materialized, outer_names
from llmquant.quantization.blocks.original import STREAM as REFERENCE
from llmquant.quantization.blocks.original import Reference
from llmquant.quantization.blocks.replay import Replay, Tail, Tails
from llmquant.quantization.plan import BlockResult, WalkPlan, batched
from llmquant.quantization.steps.channel_scaling import BlockScaling
from llmquant.quantization.steps.embedding import dequantized
from llmquant.quantization.steps.finders import scaled
from llmquant.quantization.steps.rounding import Rounded, Rounding, weight_error
from llmquant.quantization.steps.tuning import tune_block
from llmquant.records import TuneReport
from llmquant.runtime.finite import finite_there
from llmquant.stats import InputStats
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class _Block:
    """The block that is worked on: its number, itself, its path, and its linears by their names in
    it."""

    index: int
    module: nn.Module
    prefix: str
    linears: Mapping[str, nn.Linear]

    def full(self, names: Sequence[str]) -> list[str]:
        return [f"{self.prefix}.{name}" for name in names]


class Calibrated:
    """Walks with hidden states of the calibration windows.

    Args:
        rounding: of the walk's linears.
        windows: calibration token ids, each ``[positions]``.
        store: where hidden states are kept; default: in memory.
        start: the first block.
        embedding: the packed embeddings, which the walk begins with; needed for block 0 alone.
    """

    def __init__(
        self,
        rounding: Rounding,
        windows: Sequence[Tensor],
        store: StateStore | None = None,
        start: int = 0,
        embedding: QuantizedWeight | None = None,
    ) -> None:
        self._rounding, self.plan = rounding, rounding.plan
        plan = self.plan
        self._store = store = store or StateStore(plan.device)
        calls = Calls()
        aims = plan.recipe.asymmetric or plan.recipe.tune is not None
        if embedding is not None and aims:
            # What the original model computes begins with its own embeddings.
            with _embedded(plan, windows, Calls()) as first:
                store.name(REFERENCE, store.scratch(first))
        with _embedded(plan, windows, calls, embedding) as first:
            if start == 0:
                store.name(STREAM, store.scratch(first))
            else:
                for _ in first:
                    # the states before block 0 are not needed, only how blocks are called
                    pass
        if start and STREAM not in store.streams:
            raise CheckpointError(f"the hidden states before block {start} were not saved")
        store.calls = calls.settle(store.calls)
        self._replays = store.placement.replays and plan.recipe.gptq.true_sequential
        self._inputs = Inputs(store, calls, start)
        self._reference = Reference(store, self._inputs) if aims else None
        self._pairs = self._reference if plan.recipe.asymmetric else None

    def block(self, index: int, block: nn.Module, prefix: str, names: Sequence[str]) -> BlockResult:
        inside = [name.removeprefix(f"{prefix}.") for name in names]
        at = _Block(index, block, prefix, {name: _linear(block, name) for name in inside})
        reference, tuned = self._reference, None
        with materialized(self.plan, block, f"{prefix}."):
            sets, tails = self._sets(at)
            scaling = self._scale(at, sets)
            # After scaling, which leaves the block's function alone: its originals must fit the
            # norms that are now in it.
            if reference is not None:
                reference.enter(
                    block, at.linears, self._inputs, tails if self._pairs is not None else ()
                )
            transfers = self._store.transfers
            with Replay(block, tails, at.linears, transfers=transfers) as replay:
                results = self._rounded(at, sets, replay, scaling)
                if self.plan.recipe.tune is None:
                    self._advance(at, replay.batch)
            if reference is not None:
                reference.forget()
                results, tuned = self._tuned(at, results, scaling)
                reference.leave()
            if self.plan.recipe.tune is not None:
                # It moved weights, so nothing that was kept holds any longer.
                self._advance(at, no_context)
        return BlockResult(index, results, tuned, scaling.changed, scaling.reports)

    def head(self, name: str) -> BlockResult:
        norm = norm_of(self.plan.model, self.plan.architecture)
        stats = InputStats(
            self.plan.reader.info(f"{name}.weight").shape[1],
            self.plan.device,
            first_token_share=self.plan.first_token_share,
        )
        with materialized(self.plan, norm, f"{self.plan.architecture.norm}."), torch.no_grad():
            for batch in self._inputs:
                stats.add(norm(batch.hidden))
        self.plan.world.all_reduce(stats)
        return BlockResult(None, self._rounding.calibrated(self.plan.blocks, [name], stats))

    def _sets(self, at: _Block) -> tuple[list[tuple[str, ...]], list[Tail]]:
        """Linears that share an input, in execution order, and what need not run again for later
        ones."""
        if not at.linears:
            return [], []
        with Tails(at.module, at.linears) if self._replays else nullcontext() as watched:
            sets = self.plan.world.broadcast(
                stages(at.module, at.linears, self._inputs[0], self.plan.all_experts)
            )
        return sets, watched.found() if watched is not None else []

    def _scale(self, at: _Block, sets: Sequence[tuple[str, ...]]) -> BlockScaling:
        if self.plan.recipe.awq is not None or self.plan.recipe.smooth is not None:
            self._rounding.announce(at.index, f"{at.prefix} (scaling)")
        return scaled(self.plan, at.module, at.prefix, sets, self._inputs)

    def _rounded(
        self, at: _Block, sets: list[tuple[str, ...]], replay: Replay, scaling: BlockScaling
    ) -> dict[str, Rounded]:
        """Observe and round set after set; each is in the block when the next is observed."""
        results: dict[str, Rounded] = {}
        budget = sum(p.numel() for p in at.module.parameters())
        passes = (
            passes_of(at.module, sets, budget) if self.plan.recipe.gptq.true_sequential else [sets]
        )
        for together in filter(None, passes):
            stats = self._observe(at, [members[0] for members in together], replay.batch)
            for members in together:
                full = at.full(members)
                results.update(
                    self._rounding.calibrated(at.index, full, stats[members[0]], scaling.weights)
                )
                for member, name in zip(members, full, strict=True):
                    at.linears[member].weight.data.copy_(
                        results[name][0].dequantize(self.plan.dtype)
                    )
                replay.settle(members)
                if self._reference is not None:
                    self._reference.settle(members)
        return results

    def _observe(
        self, at: _Block, names: Sequence[str], context: BatchContext
    ) -> Mapping[str, InputStats]:
        wanted = {name: at.linears[name] for name in names}
        how = (self.plan.all_experts, context, self.plan.first_token_share)
        stats: Mapping[str, InputStats]
        if self._pairs is None:
            stats = observe(at.module, wanted, self._inputs, *how)
        else:
            stats = self._pairs.observe(at.module, wanted, self._inputs, *how)
        for share in stats.values():
            self.plan.world.all_reduce(share)
        return stats

    def _tuned(
        self, at: _Block, results: dict[str, Rounded], scaling: BlockScaling
    ) -> tuple[dict[str, Rounded], TuneReport | None]:
        """The block's linears moved together, where the recipe wants that, with new reports."""
        options, wanted = self.plan.tune_options, self.plan.recipe.tune
        if self._reference is None or options is None or wanted is None or not results:
            return results, None
        self._rounding.announce(at.index, f"{at.prefix} (tuning)")
        assert self._reference.outputs is not None
        own = nullcontext(self._reference.outputs)
        originals = {name: self._rounding.original(name, scaling.weights) for name in results}
        starts = {name: weight for name, (weight, _) in results.items()}
        with (
            own
            if wanted.target == "original"
            else self._reference.block_outputs(at.module, self._inputs) as targets
        ):
            weights, tuned = tune_block(
                at.module,
                at.prefix,
                originals,
                starts,
                self._inputs,
                targets,
                options,
                self.plan.dtype,
            )
        changed: dict[str, Rounded] = {}
        for name, weight in weights.items():
            errors = {
                "digest": weight.digest(),
                "weight_error": weight_error(originals[name], weight),
                "output_error": None,
            }
            changed[name] = weight, results[name][1].model_copy(update=errors)
        return changed, tuned

    def _advance(self, at: _Block, context: BatchContext) -> None:
        """Step to the next block: the states behind this one, with its quantized weights, are its
        inputs."""
        outputs = self._outputs(at, context)
        self._store.name(STREAM, self._store.streams[STREAM].replaced(outputs, self._store))
        self._inputs.block += 1

    def _outputs(self, at: _Block, context: BatchContext) -> Iterator[Tensor]:
        finite = torch.ones((), dtype=torch.bool, device=self.plan.device)
        for number, batch in enumerate(self._inputs):
            with context(number):
                hidden = run_block(at.module, batch)
            finite &= finite_there(hidden)
            yield hidden
        if not bool(finite):  # asked once: every question waits for the device
            raise QuantizationError(
                f"block {at.index} gave NaN or Inf on the calibration text at {self.plan.dtype}; use --dtype float32"
            )


@contextmanager
def _embedded(
    plan: WalkPlan,
    windows: Sequence[Tensor],
    calls: Calls,
    embedding: QuantizedWeight | None = None,
) -> Iterator[Iterator[Tensor]]:
    """The states before block 0, batch by batch, with what is before the blocks in memory.

    Args:
        calls: notes what every block is called with beside them.
        embedding: used in place of the checkpoint's.
    """
    given = {}
    if embedding is not None:
        given[f"{plan.embedding}.weight"] = dequantized(embedding, plan.dtype).to(plan.device)
    blocks = blocks_of(plan.model, plan.architecture)
    batches = plan.world.shard(batched(windows, plan.batch_size))
    with materialized(plan, plan.model, "", outer_names(plan), given):
        yield _first_states(plan, blocks, batches, calls)


def _first_states(
    plan: WalkPlan, blocks: nn.ModuleList, batches: Sequence[Tensor], calls: Calls
) -> Iterator[Tensor]:
    for ids in batches:
        (first,) = first_inputs(plan.model, blocks, [ids.to(plan.device)])
        calls.add(first.calls)
        yield first.hidden


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
