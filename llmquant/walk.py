"""The walk: block by block through a model of which only the current block exists in memory.

The model is built on the meta device. Each decoder block is filled from the checkpoint, its linears are quantized in
execution order, the block is run once more *with* its quantized weights to make the next block's inputs (so later layers
compensate for earlier errors), and it is emptied again. What leaves is a stream of :class:`BlockResult`; the walk
knows no file layout and writes nothing.

With ``true_sequential`` the inputs of each set of linears are observed after the sets before it were quantized; without
it all inputs of a block are observed in one pass with its original weights. A data-free recipe never runs the model.

Asymmetric calibration and tuning aim at what the original model computes: then its hidden states walk along beside the
quantized model's (:mod:`llmquant.reference`), and a tuned block's linears are moved once more, together, before it is left.

Hidden states live in a :class:`llmquant.states.Room`. A room that comes with saved states continues the walk that saved them:
nothing before is computed again but masks and position embeddings, and those must come out as they did then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.algorithms import (
    AWQOptions,
    Factor,
    GPTQOptions,
    ScaleSearch,
    TuneOptions,
    asymmetric_target,
    descend,
    factorize,
    gptq,
    layer_error,
    rtn,
)
from llmquant.architectures import Architecture, blocks_of, norm_of
from llmquant.calls import Calls
from llmquant.capture import BlockInput, first_inputs, observe, run_block, stages
from llmquant.checkpoint import CheckpointReader
from llmquant.errors import CheckpointError, QuantizationError
from llmquant.experts import UNSEEN, place_of
from llmquant.finite import all_finite
from llmquant.parallel import ALONE, World
from llmquant.recipe import Recipe
from llmquant.reference import Reference
from llmquant.scaling import AWQFinder, BlockScaling, Finder, PairReport, scale_block
from llmquant.smoothing import SmoothFinder, SmoothOptions
from llmquant.spec import QuantSpec
from llmquant.states import Room
from llmquant.stats import InputStats, PairStats
from llmquant.tuning import TuneReport, tune_block
from llmquant.usage import peak_resident_bytes
from llmquant.weight import QuantizedWeight

STREAM = "hidden"
"""Name of the quantized model's states in a room."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What happened to one linear.

    Attributes:
        name: full module name.
        spec: its grid.
        digest: :meth:`QuantizedWeight.digest` as the algorithm returned it.
        weight_error: ``|W - Q|^2 / |W|^2``.
        output_error: relative output error on the calibration inputs; None for a data-free method, and for a tuned block,
            whose error is measured as a whole.
        damping: GPTQ's damping as finally used; larger than the recipe's when Cholesky failed.
        dead: input channels that were zero for every calibration token.
        tokens: calibration tokens seen.
        dropped: tokens left out for NaN or Inf.
        seconds: time spent rounding; not part of the manifest.
        peak: the most bytes that this process had in RAM up to then; likewise.
        fallback: why the recipe's method was not used and the weight rounded to nearest instead, else None.
    """

    name: str
    spec: QuantSpec
    digest: str
    weight_error: float
    output_error: float | None = None
    damping: float | None = None
    dead: int = 0
    tokens: int = 0
    dropped: int = 0
    seconds: float = 0.0
    peak: int = 0
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The quantized linears of one decoder block (``index`` None: of the head), by full name; what tuning it did.

    ``changed`` holds tensors beside them (norms, biases) that scaling changed, by full name; ``scaled`` says what it did.
    """

    index: int | None
    weights: dict[str, tuple[QuantizedWeight, ModuleReport]]
    tuned: TuneReport | None = None
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    scaled: tuple[PairReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the walk is: ``block`` of ``blocks`` (the head counts as one), and the module being worked on."""

    block: int
    blocks: int
    module: str


@dataclass(frozen=True, slots=True)
class WalkPlan:
    """What to walk: the meta model, where its tensors are, and the spec of every linear to quantize, by full name.

    Of several processes in a ``world`` each walks with its share of the calibration batches; all hand out the same results.
    """

    model: PreTrainedModel
    architecture: Architecture
    reader: CheckpointReader
    specs: Mapping[str, QuantSpec]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    head: str | None = None
    world: World = ALONE

    @property
    def search(self) -> ScaleSearch:
        s = self.recipe.scales
        return ScaleSearch(s.steps, s.smallest, s.norm, s.weighted)

    @property
    def tune_options(self) -> TuneOptions | None:
        t = self.recipe.tune
        return None if t is None else TuneOptions(t.steps, t.lr, t.scale_lr, t.checks, t.patience, self.recipe.seed)

    @property
    def awq_options(self) -> AWQOptions | None:
        a = self.recipe.awq
        return None if a is None else AWQOptions(a.grid, a.duo_scaling, a.steps)

    @property
    def smooth_options(self) -> SmoothOptions | None:
        s = self.recipe.smooth
        return None if s is None else SmoothOptions(s.alpha, s.pairs == "all")

    @property
    def batch_size(self) -> int:
        """Calibration windows per pass."""
        return self.recipe.calibration.batch_size if self.recipe.tune is None else self.recipe.tune.batch_size

    @property
    def all_experts(self) -> bool:
        """Whether statistics of experts are taken over all tokens."""
        return bool(self.recipe.calibration.all_experts)

    @property
    def gptq_options(self) -> GPTQOptions:
        g = self.recipe.gptq
        return GPTQOptions(g.block_size, g.damping, g.act_order, self.search)


def walk(
    plan: WalkPlan,
    windows: Sequence[Tensor],
    on_progress: Callable[[Progress], None],
    room: Room | None = None,
    start: int = 0,
) -> Iterator[BlockResult]:
    """Quantize block after block.

    When a result is handed out, the room's named streams are the inputs of the block behind it.

    Args:
        plan: see :class:`WalkPlan`.
        windows: calibration token ids, each ``[positions]``; empty for a data-free method.
        on_progress: called before each module.
        room: where hidden states live; default: in memory.
        start: the first block to quantize. Of a calibrated walk that is not the first one, the room must hold what an earlier
            walk left in front of it.

    Raises:
        QuantizationError: NaN or Inf where there must be none; names the module.
        CheckpointError: a tensor of the model is missing from the checkpoint; saved states are damaged or do not fit.
    """
    if plan.recipe.needs_text and not windows:
        raise QuantizationError(f"method {plan.recipe.steps} needs calibration windows and got none")
    walker = _DataFree(plan, on_progress) if not windows else _Calibrated(plan, on_progress, windows, room, start)
    blocks = blocks_of(plan.model, plan.architecture)
    for index in range(start, len(blocks)):
        prefix = f"{plan.architecture.blocks}.{index}"
        names = [n for n in plan.specs if n.startswith(f"{prefix}.")]
        weights = walker.block(index, blocks[index], prefix, names)
        yield BlockResult(index, weights, walker.tuned, walker.scaling.changed, walker.scaling.reports)
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
    ) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        return self.plan.world.deal(names, lambda name: self.round_to_nearest(index, name))

    def head(self, name: str) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        return self.plan.world.deal([name], lambda n: self.round_to_nearest(self._total - 1, n))

    def round_to_nearest(self, index: int, name: str, fallback: str | None = None) -> tuple[QuantizedWeight, ModuleReport]:
        self.announce(index, name)
        start = time.perf_counter()
        weight = self.original(name)
        quantized = rtn(weight, self.plan.specs[name], self.plan.search, None, name)
        error = _weight_error(weight, quantized)
        seconds = time.perf_counter() - start
        report = ModuleReport(
            name, quantized.spec, quantized.digest(), error, seconds=seconds, peak=peak_resident_bytes(), fallback=fallback
        )
        return quantized, report


class _Calibrated(_DataFree):
    """Runs each block on the calibration windows and hands every linear its input statistics."""

    def __init__(
        self,
        plan: WalkPlan,
        on_progress: Callable[[Progress], None],
        windows: Sequence[Tensor],
        room: Room | None = None,
        start: int = 0,
    ) -> None:
        super().__init__(plan, on_progress)
        self.room = room = room or Room(plan.device)
        blocks = blocks_of(plan.model, plan.architecture)
        calls = Calls()
        with materialized(plan, plan.model, "", outer_names(plan)):
            first = _first_states(plan, blocks, plan.world.mine(batched(windows, plan.batch_size)), calls)
            if start == 0:
                room.name(STREAM, room.scratch(first))
            else:
                for _ in first:
                    pass  # the states in front of block 0 are not needed, only how blocks are called
        if start and STREAM not in room.streams:
            raise CheckpointError(f"the hidden states in front of block {start} were not saved")
        room.calls = calls.settle(room.calls)
        self.inputs = _Inputs(room, calls, start)
        aims = plan.recipe.asymmetric or plan.recipe.tune is not None
        self.reference = Reference(room, self.inputs) if aims else None
        self._pairs = self.reference if plan.recipe.asymmetric else None

    def block(
        self, index: int, block: nn.Module, prefix: str, names: Sequence[str]
    ) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        results: dict[str, tuple[QuantizedWeight, ModuleReport]] = {}
        with materialized(self.plan, block, f"{prefix}."):
            linears = {n.removeprefix(f"{prefix}."): _linear(block, n.removeprefix(f"{prefix}.")) for n in names}
            sets = self.plan.world.told(stages(block, linears, self.inputs[0], self.plan.all_experts)) if linears else []
            self._scale(index, block, prefix, sets)
            # After scaling, which leaves the block's function alone: its originals must fit the norms that now stand in it.
            if self.reference is not None:
                self.reference.enter(block, linears, self.inputs)
            room = sum(p.numel() for p in block.parameters())
            passes = passes_of(block, sets, room) if self.plan.recipe.gptq.true_sequential else [sets]
            for together in passes:
                stats = self._observe(block, {s[0]: linears[s[0]] for s in together}) if together else {}
                for members in together:
                    full = [f"{prefix}.{m}" for m in members]
                    results.update(self.quantize_set(index, full, stats[members[0]]))
                    for member, name in zip(members, full, strict=True):
                        linears[member].weight.data.copy_(results[name][0].dequantize(self.plan.dtype))
            if self.reference is not None:
                results = self._tuned(index, block, prefix, results)
                self.reference.leave()
            self._advance(block, index)
        return results

    def _scale(self, index: int, block: nn.Module, prefix: str, sets: Sequence[tuple[str, ...]]) -> None:
        if self.plan.recipe.awq is not None or self.plan.recipe.smooth is not None:
            self.announce(index, f"{prefix} (scaling)")
        find = self._finder(block, prefix, sets)
        if find is None:
            return
        config = self.plan.model.config.get_text_config()
        heads: int = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1) or 1
        if self.plan.world.first:
            self.scaling = scale_block(
                block, prefix, sets, self.inputs, self.plan.reader, self.plan.architecture, heads, find
            )
        self._share_scaling(block, prefix)

    def _share_scaling(self, block: nn.Module, prefix: str) -> None:
        """Give every process what the first one found, in the block too."""
        if self.plan.world.size == 1:
            return
        names = [name.removeprefix(f"{prefix}.") for name in (*self.scaling.weights, *self.scaling.changed)]
        found = self.scaling, {name: block.get_parameter(name).data for name in names}
        self.scaling, values = self.plan.world.told(found)
        for name, value in values.items():
            block.get_parameter(name).data.copy_(value)

    def _finder(self, block: nn.Module, prefix: str, sets: Sequence[tuple[str, ...]]) -> Finder | None:
        """The recipe's search for channel scales; None where it wants none or has nothing to scale for."""
        plan, awq, smooth = self.plan, self.plan.awq_options, self.plan.smooth_options
        self.scaling = BlockScaling({}, {}, ())
        if not sets:
            return None
        if smooth is not None:
            names = (f"{prefix}.{m}" for s in sets for m in s)
            int8 = frozenset(n for n in names if plan.recipe.weights_of(n).activations == "int8-dynamic")
            return SmoothFinder(block, sets, self.inputs, plan.specs, int8, plan.search, smooth, plan.all_experts)
        if awq is None:
            return None
        return AWQFinder(block, sets, self.inputs, plan.specs, plan.search, awq, plan.all_experts, plan.world)

    def _observe(self, block: nn.Module, wanted: Mapping[str, nn.Linear]) -> Mapping[str, InputStats]:
        stats: Mapping[str, InputStats]
        if self._pairs is None:
            stats = observe(block, wanted, self.inputs, self.plan.all_experts)
        else:
            stats = self._pairs.observe(block, wanted, self.inputs, self.plan.all_experts)
        for share in stats.values():
            self.plan.world.add_up(share)
        return stats

    def _tuned(
        self, index: int, block: nn.Module, prefix: str, results: dict[str, tuple[QuantizedWeight, ModuleReport]]
    ) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        """The block's linears moved together, where the recipe wants that, and reported anew."""
        self.tuned, options, wanted = None, self.plan.tune_options, self.plan.recipe.tune
        if self.reference is None or options is None or wanted is None or not results:
            return results
        self.announce(index, f"{prefix} (tuning)")
        assert self.reference.outputs is not None
        own = nullcontext(self.reference.outputs)
        originals = {name: self.original(name) for name in results}
        starts = {name: weight for name, (weight, _) in results.items()}
        with own if wanted.target == "original" else self.reference.block_outputs(block, self.inputs) as targets:
            weights, self.tuned = tune_block(block, prefix, originals, starts, self.inputs, targets, options, self.plan.dtype)
        return {
            name: (weight, replace(
                results[name][1], digest=weight.digest(), weight_error=_weight_error(originals[name], weight), output_error=None
            ))
            for name, weight in weights.items()
        }  # fmt: skip

    def _advance(self, block: nn.Module, index: int) -> None:
        self.room.name(STREAM, self.room.streams[STREAM].replaced(self._outputs(block, index), self.room))
        self.inputs.block += 1

    def _outputs(self, block: nn.Module, index: int) -> Iterator[Tensor]:
        for batch in self.inputs:
            hidden = run_block(block, batch)
            if not all_finite(hidden):
                raise QuantizationError(
                    f"block {index} gave NaN or Inf on the calibration text at {self.plan.dtype}; use --dtype float32"
                )
            yield hidden

    def head(self, name: str) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        norm = norm_of(self.plan.model, self.plan.architecture)
        stats = InputStats(self.plan.reader.info(f"{name}.weight").shape[1], self.plan.device)
        with materialized(self.plan, norm, f"{self.plan.architecture.norm}."), torch.no_grad():
            for batch in self.inputs:
                stats.add(norm(batch.hidden))
        self.plan.world.add_up(stats)
        return self.quantize_set(self._total - 1, [name], stats)

    def quantize_set(
        self, index: int, names: Sequence[str], stats: InputStats
    ) -> dict[str, tuple[QuantizedWeight, ModuleReport]]:
        """Quantize linears that share an input: one Hessian, one factorization."""
        if stats.tokens == 0 and stats.dropped == 0 and place_of(self.plan.model, names[0]):
            return self.plan.world.deal(names, lambda name: self.round_to_nearest(index, name, UNSEEN))
        if stats.tokens == 0:
            raise QuantizationError(f"{names[0]} saw no finite calibration token ({stats.dropped} dropped)")
        world, factor = self.plan.world, None
        if self.plan.recipe.method == "gptq" and world.mine(names):
            factor = factorize(stats.hessian, self.plan.gptq_options, names[0])

        def rounded(name: str) -> tuple[QuantizedWeight, ModuleReport]:
            self.announce(index, name)
            return self._with_stats(name, stats, factor)

        return world.deal(names, rounded)

    def _with_stats(self, name: str, stats: InputStats, factor: Factor | None) -> tuple[QuantizedWeight, ModuleReport]:
        start = time.perf_counter()
        weight, spec = self.original(name), self.plan.specs[name]
        if factor is None:
            quantized = rtn(weight, spec, self.plan.search, stats.importance, name)
        else:
            quantized = self._gptq(weight, stats, factor, spec, name)
        dequantized = quantized.dequantize()
        report = ModuleReport(
            name=name,
            spec=spec,
            digest=quantized.digest(),
            weight_error=_weight_error(weight, quantized),
            output_error=layer_error(weight, dequantized, stats.hessian),
            damping=factor.damping if factor else None,
            dead=int((stats.hessian.diagonal() == 0).sum()),
            tokens=stats.tokens,
            dropped=stats.dropped,
            seconds=time.perf_counter() - start,
            peak=peak_resident_bytes(),
        )
        return quantized, report

    def _gptq(self, weight: Tensor, stats: InputStats, factor: Factor, spec: QuantSpec, name: str) -> QuantizedWeight:
        """GPTQ with the recipe's refinements around it."""
        wanted, target = self.plan.recipe.gptq, weight
        if isinstance(stats, PairStats):
            target = asymmetric_target(weight, stats.hessian, stats.cross, factor, wanted.asymmetric)
        quantized = gptq(target, factor, spec, self.plan.gptq_options, name)
        if wanted.passes == 0:
            return quantized
        damped = stats.hessian.clone()
        damped.diagonal().add_(factor.damping * damped.diagonal().mean())
        return descend(target, quantized, damped, wanted.passes, wanted.block_size)


class _Inputs(Sequence[BlockInput]):
    """Every batch's way into ``block``, put together when it is asked for: a GPU holds one batch of states, not all."""

    def __init__(self, room: Room, calls: Calls, block: int) -> None:
        self.room, self.calls, self.block = room, calls, block

    def __len__(self) -> int:
        return len(self.room.streams[STREAM])

    @overload
    def __getitem__(self, index: int) -> BlockInput: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockInput]: ...
    def __getitem__(self, index: int | slice) -> BlockInput | list[BlockInput]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return BlockInput(self.room.streams[STREAM][index], self.calls.of(index, self.block, self.room.device))


def _first_states(plan: WalkPlan, blocks: nn.ModuleList, batches: Sequence[Tensor], calls: Calls) -> Iterator[Tensor]:
    """The states in front of block 0, batch by batch; ``calls`` notes what every block is called with beside them."""
    for ids in batches:
        (first,) = first_inputs(plan.model, blocks, [ids.to(plan.device)])
        calls.add(first.calls)
        yield first.hidden


def passes_of(block: nn.Module, sets: Sequence[tuple[str, ...]], room: int) -> list[list[tuple[str, ...]]]:
    """Sets to observe together: each by itself, but those of a block's experts, which do not read one another, side by side.

    As many experts at a time as have Hessians of no more than ``room`` numbers together, and at least one.
    """
    places = {members: place_of(block, members[0]) for members in sets}
    largest = max((_linear(block, s[0]).in_features ** 2 for s, place in places.items() if place), default=1)
    together = max(1, room // largest)
    passes: dict[object, list[tuple[str, ...]]] = {}
    for members, place in places.items():
        key = members if place is None else (place.expert // together, place.linear)
        passes.setdefault(key, []).append(members)
    return list(passes.values())


def batched(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Stack windows of equal length ``[batch, positions]``; no padding, so no token is ever seen twice or masked."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(window.numel(), []).append(window)
    return [
        torch.stack(same[i : i + batch_size])
        for _, same in sorted(by_length.items(), reverse=True)
        for i in range(0, len(same), batch_size)
    ]


def _weight_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    norm = float(weight.square().sum())
    return float((weight - quantized.dequantize()).square().sum()) / norm if norm > 0 else 0.0


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def outer_names(plan: WalkPlan) -> list[str]:
    """Tensors outside the blocks and the head: embeddings and norms, what the forward pass needs before block 0."""
    head = plan.model.get_output_embeddings()
    inside = [f"{n}." for n, m in plan.model.named_modules() if m is head and m is not None]
    inside.append(f"{plan.architecture.blocks}.")
    return [name for name, _ in plan.model.named_parameters() if not name.startswith(tuple(inside))]


@contextmanager
def materialized(plan: WalkPlan, module: nn.Module, prefix: str, only: Sequence[str] | None = None) -> Iterator[None]:
    """Fill a module's meta parameters from the checkpoint; put them back on meta afterwards, whatever happens."""
    names = list(only) if only is not None else [n for n, _ in module.named_parameters()]
    meta: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            parameter = owner.get_parameter(leaf)
            value = _read_parameter(plan, f"{prefix}{name}", parameter.shape)
            meta.append((owner, leaf, parameter))
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for owner, leaf, parameter in meta:
            setattr(owner, leaf, parameter)


def _read_parameter(plan: WalkPlan, name: str, shape: torch.Size) -> Tensor:
    if name not in plan.reader:
        raise CheckpointError(f"{plan.reader.path}: tensor {name} of the model is not in the checkpoint")
    tensor = plan.reader.read(name)
    if tensor.shape != shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)} in the checkpoint, config.json makes it {list(shape)}")
    if not all_finite(tensor):
        raise QuantizationError(f"{plan.reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?")
    # A copy even when no cast is needed: quantized weights are written into it, never into the mapped file.
    return tensor.to(plan.device, plan.dtype, copy=True)
