"""The walk: block by block through a model of which only the current block exists in memory.

The model is built on the meta device. Each decoder block is filled from the checkpoint, its linears
are quantized in execution order, the block is run once more *with* its quantized weights to make
the next block's inputs (so later layers compensate for earlier errors), and it is emptied again.
What leaves is a stream of :class:`BlockResult`; the walk knows no file layout and writes nothing.

With ``true_sequential`` the inputs of each set of linears are observed after the sets before it
were quantized; without it all inputs of a block are observed in one pass with its original weights.
A data-free recipe never runs the model.

Asymmetric calibration and tuning aim at what the original model computes: then its hidden states
walk along beside the quantized model's (:mod:`llmquant.quantization.blocks.original`), and a tuned
block's linears are moved once more, together, before it is left.

Hidden states live in a :class:`llmquant.quantization.blocks.hidden_states.StateStore`. A store that
comes with saved states continues the walk that saved them: nothing before is computed again but
masks and position embeddings, and those must come out as they did then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmquant.algorithms import factorize
from llmquant.errors import CheckpointError, QuantizationError
from llmquant.models.architectures import blocks_of, norm_of
from llmquant.models.block_inputs import first_inputs, run_block
from llmquant.models.experts import UNSEEN, passes_of, place_of
from llmquant.quantization.blocks.calls import Calls
from llmquant.quantization.blocks.capture import Around, nothing, observe, stages
from llmquant.quantization.blocks.hidden_states import StateStore
from llmquant.quantization.blocks.inputs import STREAM, Inputs
from llmquant.quantization.blocks.materialize import materialized, outer_names
from llmquant.quantization.blocks.original import Reference
from llmquant.quantization.blocks.replay import Replay, Tail, Tails
from llmquant.quantization.plan import BlockResult, Progress, WalkPlan, batched
from llmquant.quantization.steps.channel_scaling import AWQFinder, BlockScaling, Finder, scale_block
from llmquant.quantization.steps.rounding import Rounded, to_nearest, weight_error, with_statistics
from llmquant.quantization.steps.smoothquant import SmoothFinder
from llmquant.quantization.steps.tuning import TuneReport, tune_block
from llmquant.runtime.finite import all_finite
from llmquant.stats import InputStats


def walk(
    plan: WalkPlan,
    windows: Sequence[Tensor],
    on_progress: Callable[[Progress], None],
    store: StateStore | None = None,
    start: int = 0,
) -> Iterator[BlockResult]:
    """Quantize block after block.

    When a result is handed out, the store's named streams are the inputs of the next block.

    Args:
        plan: see :class:`WalkPlan`.
        windows: calibration token ids, each ``[positions]``; empty for a data-free method.
        on_progress: called before each module.
        store: where hidden states live; default: in memory.
        start: the first block to quantize. Of a calibrated walk that is not the first one, the
            store must hold what an earlier walk left in front of it.

    Raises:
        QuantizationError: NaN or Inf where there must be none; names the module.
        CheckpointError: a tensor of the model is missing from the checkpoint; saved states are
            damaged or do not fit.
    """
    if plan.recipe.needs_text and not windows:
        raise QuantizationError(
            f"method {plan.recipe.steps} needs calibration windows and got none"
        )
    walker = (
        _DataFree(plan, on_progress)
        if not windows
        else _Calibrated(plan, on_progress, windows, store, start)
    )
    blocks = blocks_of(plan.model, plan.architecture)
    for index in range(start, len(blocks)):
        prefix = f"{plan.architecture.blocks}.{index}"
        names = [n for n in plan.specs if n.startswith(f"{prefix}.")]
        weights = walker.block(index, blocks[index], prefix, names)
        yield BlockResult(
            index, weights, walker.tuned, walker.scaling.changed, walker.scaling.reports
        )
    if plan.head is not None:
        yield BlockResult(None, walker.head(plan.head))


class _DataFree:
    """Reads one weight at a time; the model is never run."""

    def __init__(self, plan: WalkPlan, on_progress: Callable[[Progress], None]) -> None:
        self.plan = plan
        self._on_progress = on_progress
        self._total = len(blocks_of(plan.model, plan.architecture)) + (plan.head is not None)
        self.tuned: TuneReport | None = None  # of the block last worked on
        self.scaling = BlockScaling({}, {}, ())  # likewise

    def announce(self, index: int, module: str) -> None:
        self._on_progress(Progress(index, self._total, module))

    def original(self, name: str) -> Tensor:
        """A linear's float32 weight as rounding starts from it."""
        if f"{name}.weight" in self.scaling.weights:
            return self.scaling.weights[f"{name}.weight"]
        return self.plan.reader.read(f"{name}.weight").to(self.plan.device, torch.float32)

    def block(
        self, index: int, block: nn.Module, prefix: str, names: Sequence[str]
    ) -> dict[str, Rounded]:
        return self.plan.world.scatter_gather(
            names, lambda name: self.round_to_nearest(index, name)
        )

    def head(self, name: str) -> dict[str, Rounded]:
        return self.plan.world.scatter_gather(
            [name], lambda n: self.round_to_nearest(self._total - 1, n)
        )

    def round_to_nearest(self, index: int, name: str, fallback: str | None = None) -> Rounded:
        self.announce(index, name)
        return to_nearest(self.plan, name, self.original(name), fallback)


class _Calibrated(_DataFree):
    """Runs each block on the calibration windows and hands every linear its input statistics."""

    def __init__(
        self,
        plan: WalkPlan,
        on_progress: Callable[[Progress], None],
        windows: Sequence[Tensor],
        store: StateStore | None = None,
        start: int = 0,
    ) -> None:
        super().__init__(plan, on_progress)
        self.store = store = store or StateStore(plan.device)
        blocks = blocks_of(plan.model, plan.architecture)
        calls = Calls()
        with materialized(plan, plan.model, "", outer_names(plan)):
            first = _first_states(
                plan, blocks, plan.world.shard(batched(windows, plan.batch_size)), calls
            )
            if start == 0:
                store.name(STREAM, store.scratch(first))
            else:
                for _ in first:
                    # the states in front of block 0 are not needed, only how blocks are called
                    pass
        if start and STREAM not in store.streams:
            raise CheckpointError(f"the hidden states in front of block {start} were not saved")
        store.calls = calls.settle(store.calls)
        self.replays = store.placement.replays and plan.recipe.gptq.true_sequential
        self.inputs = Inputs(store, calls, start)
        aims = plan.recipe.asymmetric or plan.recipe.tune is not None
        self.reference = Reference(store, self.inputs) if aims else None
        self._pairs = self.reference if plan.recipe.asymmetric else None

    def block(
        self, index: int, block: nn.Module, prefix: str, names: Sequence[str]
    ) -> dict[str, Rounded]:
        results: dict[str, Rounded] = {}
        with materialized(self.plan, block, f"{prefix}."):
            linears = {
                n.removeprefix(f"{prefix}."): _linear(block, n.removeprefix(f"{prefix}."))
                for n in names
            }
            sets, tails = self._sets(block, linears)
            self._scale(index, block, prefix, sets)
            # After scaling, which leaves the block's function alone: its originals must fit the
            # norms that now stand in it.
            if self.reference is not None:
                self.reference.enter(
                    block, linears, self.inputs, tails if self._pairs is not None else ()
                )
            store = sum(p.numel() for p in block.parameters())
            passes = (
                passes_of(block, sets, store) if self.plan.recipe.gptq.true_sequential else [sets]
            )
            with Replay(block, tails, linears) as replay:
                for together in passes:
                    stats = (
                        self._observe(block, {s[0]: linears[s[0]] for s in together}, replay.batch)
                        if together
                        else {}
                    )
                    for members in together:
                        full = [f"{prefix}.{m}" for m in members]
                        results.update(self.quantize_set(index, full, stats[members[0]]))
                        for member, name in zip(members, full, strict=True):
                            linears[member].weight.data.copy_(
                                results[name][0].dequantize(self.plan.dtype)
                            )
                        replay.settle(members)
                        if self.reference is not None:
                            self.reference.settle(members)
                if self.plan.recipe.tune is None:
                    self._advance(block, index, replay.batch)
            if self.reference is not None:
                self.reference.forget()
                results = self._tuned(index, block, prefix, results)
                self.reference.leave()
            if (
                self.plan.recipe.tune is not None
            ):  # it moved weights, so nothing that was kept holds any longer
                self._advance(block, index, nothing)
        return results

    def _sets(
        self, block: nn.Module, linears: Mapping[str, nn.Linear]
    ) -> tuple[list[tuple[str, ...]], list[Tail]]:
        """Linears that share an input, in execution order, and what need not run again for those
        behind them."""
        if not linears:
            return [], []
        with Tails(block, linears) if self.replays else nullcontext() as watched:
            sets = self.plan.world.broadcast(
                stages(block, linears, self.inputs[0], self.plan.all_experts)
            )
        return sets, watched.found() if watched is not None else []

    def _scale(
        self, index: int, block: nn.Module, prefix: str, sets: Sequence[tuple[str, ...]]
    ) -> None:
        if self.plan.recipe.awq is not None or self.plan.recipe.smooth is not None:
            self.announce(index, f"{prefix} (scaling)")
        find = self._finder(block, prefix, sets)
        if find is None:
            return
        config = self.plan.model.config.get_text_config()
        heads: int = (
            getattr(config, "num_key_value_heads", None)
            or getattr(config, "num_attention_heads", 1)
            or 1
        )
        if self.plan.world.first:
            self.scaling = scale_block(
                block,
                prefix,
                sets,
                self.inputs,
                self.plan.reader,
                self.plan.architecture,
                heads,
                find,
            )
        self._share_scaling(block, prefix)

    def _share_scaling(self, block: nn.Module, prefix: str) -> None:
        """Give every process what the first one found, in the block too."""
        if self.plan.world.size == 1:
            return
        names = [
            name.removeprefix(f"{prefix}.")
            for name in (*self.scaling.weights, *self.scaling.changed)
        ]
        found = self.scaling, {name: block.get_parameter(name).data for name in names}
        self.scaling, values = self.plan.world.broadcast(found)
        for name, value in values.items():
            block.get_parameter(name).data.copy_(value)

    def _finder(
        self, block: nn.Module, prefix: str, sets: Sequence[tuple[str, ...]]
    ) -> Finder | None:
        """The recipe's search for channel scales; None where it wants none or has nothing to scale
        for."""
        plan, awq, smooth = self.plan, self.plan.awq_options, self.plan.smooth_options
        self.scaling = BlockScaling({}, {}, ())
        if not sets:
            return None
        if smooth is not None:
            names = (f"{prefix}.{m}" for s in sets for m in s)
            int8 = frozenset(
                n for n in names if plan.recipe.weights_of(n).activations == "int8-dynamic"
            )
            return SmoothFinder(
                block, sets, self.inputs, plan.specs, int8, plan.search, smooth, plan.all_experts
            )
        if awq is None:
            return None
        return AWQFinder(
            block, sets, self.inputs, plan.specs, plan.search, awq, plan.all_experts, plan.world
        )

    def _observe(
        self, block: nn.Module, wanted: Mapping[str, nn.Linear], around: Around
    ) -> Mapping[str, InputStats]:
        stats: Mapping[str, InputStats]
        if self._pairs is None:
            stats = observe(block, wanted, self.inputs, self.plan.all_experts, around)
        else:
            stats = self._pairs.observe(block, wanted, self.inputs, self.plan.all_experts, around)
        for share in stats.values():
            self.plan.world.all_reduce(share)
        return stats

    def _tuned(
        self, index: int, block: nn.Module, prefix: str, results: dict[str, Rounded]
    ) -> dict[str, Rounded]:
        """The block's linears moved together, where the recipe wants that, and reported anew."""
        self.tuned, options, wanted = None, self.plan.tune_options, self.plan.recipe.tune
        if self.reference is None or options is None or wanted is None or not results:
            return results
        self.announce(index, f"{prefix} (tuning)")
        assert self.reference.outputs is not None
        own = nullcontext(self.reference.outputs)
        originals = {name: self.original(name) for name in results}
        starts = {name: weight for name, (weight, _) in results.items()}
        with (
            own
            if wanted.target == "original"
            else self.reference.block_outputs(block, self.inputs) as targets
        ):
            weights, self.tuned = tune_block(
                block, prefix, originals, starts, self.inputs, targets, options, self.plan.dtype
            )
        return {
            name: (
                weight,
                replace(
                    results[name][1],
                    digest=weight.digest(),
                    weight_error=weight_error(originals[name], weight),
                    output_error=None,
                ),
            )
            for name, weight in weights.items()
        }

    def _advance(self, block: nn.Module, index: int, around: Around) -> None:
        self.store.name(
            STREAM,
            self.store.streams[STREAM].replaced(self._outputs(block, index, around), self.store),
        )
        self.inputs.block += 1

    def _outputs(self, block: nn.Module, index: int, around: Around) -> Iterator[Tensor]:
        for number, batch in enumerate(self.inputs):
            with around(number):
                hidden = run_block(block, batch)
            if not all_finite(hidden):
                raise QuantizationError(
                    f"block {index} gave NaN or Inf on the calibration text at {self.plan.dtype}; use --dtype float32"
                )
            yield hidden

    def head(self, name: str) -> dict[str, Rounded]:
        norm = norm_of(self.plan.model, self.plan.architecture)
        stats = InputStats(self.plan.reader.info(f"{name}.weight").shape[1], self.plan.device)
        with materialized(self.plan, norm, f"{self.plan.architecture.norm}."), torch.no_grad():
            for batch in self.inputs:
                stats.add(norm(batch.hidden))
        self.plan.world.all_reduce(stats)
        return self.quantize_set(self._total - 1, [name], stats)

    def quantize_set(
        self, index: int, names: Sequence[str], stats: InputStats
    ) -> dict[str, Rounded]:
        """Quantize linears that share an input: one Hessian, one factorization."""
        if stats.tokens == 0 and stats.dropped == 0 and place_of(self.plan.model, names[0]):
            return self.plan.world.scatter_gather(
                names, lambda name: self.round_to_nearest(index, name, UNSEEN)
            )
        if stats.tokens == 0:
            raise QuantizationError(
                f"{names[0]} saw no finite calibration token ({stats.dropped} dropped)"
            )
        world, factor = self.plan.world, None
        if self.plan.recipe.method == "gptq" and world.shard(names):
            factor = factorize(stats.hessian, self.plan.gptq_options, names[0])

        def one(name: str) -> Rounded:
            self.announce(index, name)
            return with_statistics(self.plan, name, self.original(name), stats, factor)

        return world.scatter_gather(names, one)


def _first_states(
    plan: WalkPlan, blocks: nn.ModuleList, batches: Sequence[Tensor], calls: Calls
) -> Iterator[Tensor]:
    """The states in front of block 0, batch by batch; ``calls`` notes what every block is called
    with beside them."""
    for ids in batches:
        (first,) = first_inputs(plan.model, blocks, [ids.to(plan.device)])
        calls.add(first.calls)
        yield first.hidden


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
