"""allocate: which width and group size each linear gets, so that a model of a given size loses as little as possible.

Three steps. Every item (linears that engines fuse, else one linear) and every scheme that layout and engine can hold becomes an
option with its bytes, which are those the layout really writes (:class:`llmquant.plan.Sizes`: zero-points, scales and padding
included). :mod:`llmquant.sensitivity` says what each option costs in quality, from one pass through the model.
:mod:`llmquant.knapsack` picks one option per item within the budget, with a proof of how near to the optimum it is.

The budget is ``target_bpw`` bits times the weights of all linears that the recipe selects. A linear that keeps its 16 bits counts
with them, though the result then calls it unquantized; so ``bits_per_weight`` here is over all selected linears, while a
manifest's is over the packed ones alone.

The outcome is a recipe: the most common scheme as ``weights``, an override for each linear that differs, the 16-bit ones under
``ignore``. It says everything, so it can be read, edited and run again without this module. Overrides of the recipe that one
starts from are kept: they pin their linears (and those fused with them).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmquant import architectures
from llmquant.architectures import Architecture
from llmquant.checkpoint import CheckpointReader
from llmquant.devices import parse_device, parse_dtype
from llmquant.engines import why_not
from llmquant.errors import SourceError, SpecError, UsageError
from llmquant.fit import check_fit
from llmquant.formats import FORMATS, Format, Scheme
from llmquant.hub import resolve
from llmquant.knapsack import Option, Solution, solve, undominated
from llmquant.pipeline import Events, QuantizeOptions, calibration_of, deterministic, refuse_quantized
from llmquant.plan import Sizes
from llmquant.recipe import Recipe, Weights, matches
from llmquant.selection import Linears, linears_of, select
from llmquant.sensitivity import Damage, Item, Kind, Probe, measure
from llmquant.skeleton import empty_model
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.walk import WalkPlan

UNQUANTIZED = 16
# vLLM's GPU kernels take 4 and 8 bits; what its CPU build takes is in the engine table.
_WIDTHS = {"vllm": (4, 8, UNQUANTIZED)}
_ENGINES = {"vllm": None, "vllm-cpu": "vllm (CPU)", "transformers": "transformers"}


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """The budget and what may be chosen.

    Attributes:
        target_bpw: at most this many bits per weight over all selected linears.
        widths: of 2, 3, 4, 8 and 16 (left unquantized).
        group_sizes: -1 is one scale per row; a size that does not divide a linear is no option for it.
        symmetric: only symmetric (True) or only asymmetric schemes (False), None for both.
        engine: ``any``, or one whose refusals count: ``vllm`` (GPU), ``vllm-cpu``, ``transformers``.
        sensitivity: ``kl`` or ``block``; see :mod:`llmquant.sensitivity`.
        probe_tokens: calibration tokens on which damage is measured and that rounding does not see: the last windows, whole
            ones, at most half of them.
        device, dtype, evaluation: as for a quantization run.
    """

    target_bpw: float
    widths: tuple[int, ...] = (*SUPPORTED_BITS, UNQUANTIZED)
    group_sizes: tuple[int, ...] = (32, 64, 128, -1)
    symmetric: bool | None = None
    engine: str = "any"
    sensitivity: Kind = "kl"
    probe_tokens: int = 8192
    device: str = "cpu"
    dtype: str = "auto"
    evaluation: str | None = None

    def __post_init__(self) -> None:
        possible = (*SUPPORTED_BITS, UNQUANTIZED)
        if not self.widths or any(w not in possible for w in self.widths):
            raise UsageError(f"widths {_told(self.widths)}: choose among {_told(possible)}")
        if not self.group_sizes or any(g != -1 and g < 1 for g in self.group_sizes):
            raise UsageError(f"group sizes {_told(self.group_sizes)}: each is positive, or -1 for one scale per row")
        if self.engine not in ("any", *_ENGINES):
            raise UsageError(f"engine {self.engine!r} is not one of any, {', '.join(_ENGINES)}")
        if self.sensitivity not in ("kl", "block"):
            raise UsageError(f"sensitivity {self.sensitivity!r} is not one of kl, block")
        if not math.isfinite(self.target_bpw) or self.target_bpw <= 0:
            raise UsageError(f"a target of {self.target_bpw} bits per weight cannot be met")
        if self.probe_tokens < 1:
            raise UsageError(f"probe_tokens {self.probe_tokens} must be at least 1")


@dataclass(frozen=True, slots=True)
class Allocated:
    """One item's outcome.

    Attributes:
        names: its linears.
        scheme: None where it stays unquantized.
        nbytes: what its packed tensors take.
        weights: their elements.
        damage: predicted cost of the choice.
        layer: GPTQ's objective of the choice, per token.
        next_scheme: the next larger choice worth having, None at the largest.
        gain: damage that it would save per further megabyte.
    """

    names: tuple[str, ...]
    scheme: Scheme | None
    nbytes: int
    weights: int
    damage: float
    layer: float
    next_scheme: str | None
    gain: float | None

    @property
    def label(self) -> str:
        return "unquantized" if self.scheme is None else str(self.scheme)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The outcome.

    Attributes:
        recipe: to be run, read or edited.
        items: in the model's order.
        target_bpw: asked for.
        bits_per_weight: reached; never above the target.
        smallest: bits per weight of the smallest possible allocation.
        largest: of the largest.
        predicted: sum of the items' damage.
        gap: by how much of that a better allocation could be better; 0 is proved optimal.
        unit: of the damage.
    """

    recipe: Recipe
    items: tuple[Allocated, ...]
    target_bpw: float
    bits_per_weight: float
    smallest: float
    largest: float
    predicted: float
    gap: float
    unit: str


@dataclass(frozen=True, slots=True)
class _Choice:
    """An item and what it may become: scheme (None: unquantized) → bytes."""

    block: int | None
    names: tuple[str, ...]
    sizes: Mapping[Scheme | None, int]
    weights: int


def allocate(
    model: str | os.PathLike[str], recipe: Recipe, options: AllocateOptions, events: Events | None = None
) -> Allocation:
    """Choose a scheme for every linear that the recipe selects.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        recipe: method, patterns, calibration and format; its overrides pin linears, its ``weights`` are replaced.
        options: the budget and what may be chosen.
        events: callbacks.

    Raises:
        UsageError: a target outside what is possible (with the range), no calibration text, or what ``quantize`` refuses.
        FormatError: the layout cannot hold a mix.
        CheckpointError, ArchitectureError, QuantizationError: as in ``quantize``.
    """
    events = events or Events()
    reader = CheckpointReader(resolve(model))
    refuse_quantized(reader)
    if recipe.format not in FORMATS:
        raise UsageError(f"format {recipe.format!r} does not exist; choose one of {', '.join(FORMATS)}")
    if recipe.calibration.source is None:
        raise SourceError("an allocation measures on text: give --calibration file:PATH, jsonl:PATH#FIELD or hf:…")
    layout = FORMATS[recipe.format]
    device, dtype = parse_device(options.device), parse_dtype(options.dtype, auto=torch.float32)
    skeleton = empty_model(reader, dtype)
    architecture = architectures.find(skeleton, str(reader.config.get("model_type")))
    linears = linears_of(skeleton)
    choices = _choices(linears, architecture, recipe, layout, options, reader)
    _check_layout(choices, linears, architecture, recipe, layout)
    budget = _budget(choices, options.target_bpw)
    check_fit(reader, skeleton)
    run = QuantizeOptions(device=options.device, dtype=options.dtype, evaluation=options.evaluation)
    calibration = calibration_of(reader, recipe, run, skeleton)
    assert calibration is not None
    events.on_calibration(calibration)
    plan = WalkPlan(skeleton, architecture, reader, {}, recipe, device, dtype)
    items = [Item(c.block, c.names, tuple(s.spec for s in c.sizes if s is not None)) for c in choices]
    seen, unseen = split_windows(calibration.windows, options.probe_tokens)
    with deterministic(recipe.seed):
        damages = measure(plan, items, seen, Probe(options.sensitivity, unseen), events.on_progress)
    return _decide(choices, damages, budget, recipe, options, linears)


def split_windows(windows: Sequence[torch.Tensor], tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows to round by, and the last ones, of at least ``tokens`` tokens together but at most half of all, to measure on.

    GPTQ's errors are smaller on the windows it has seen, and the more so the wider a linear is: measured there, wide ones would
    look better than they will be. A single window serves for both.
    """
    taken, count = 0, 0
    while count < tokens and taken < len(windows) // 2:
        taken += 1
        count += windows[-taken].numel()
    taken = max(taken, 1)
    return list(windows[:-taken] or windows), list(windows[-taken:])


def fused_items(names: Sequence[str], architecture: Architecture) -> list[tuple[int | None, tuple[str, ...]]]:
    """Block index (None for the head) and names of each set of linears that must share a scheme, in the order of ``names``."""
    found: dict[tuple[int | None, object], list[str]] = {}
    for name in names:
        inside = name.removeprefix(f"{architecture.blocks}.")
        index, _, leaf = inside.partition(".")
        block = int(index) if inside != name else None
        together = next((t for t in architecture.fused if block is not None and leaf in t), name)
        found.setdefault((block, together), []).append(name)
    return [(block, tuple(members)) for (block, _), members in found.items()]


def _choices(
    linears: Linears,
    architecture: Architecture,
    recipe: Recipe,
    layout: Format,
    options: AllocateOptions,
    reader: CheckpointReader,
) -> list[_Choice]:
    names = [n for n in linears.shapes if recipe.selects(n)]
    if not names:
        raise UsageError(
            f"the recipe selects none of the model's {len(linears.shapes)} linears; check --include and --ignore"
        )
    sizes = Sizes(layout)
    found = []
    for block, members in fused_items(names, architecture):
        stored = {n: reader.info(f"{n}.weight") for n in members}
        taken: dict[Scheme | None, int] = {}
        for scheme in _schemes(members, recipe, options):
            if all(_holds(scheme, linears.shapes[n], layout, options.engine) for n in members):
                taken[scheme] = sum(sizes.nbytes(scheme, linears.shapes[n], i.dtype) for n, i in stored.items())
        if UNQUANTIZED in options.widths and not _pinned(members, recipe):
            taken[None] = sum(i.nbytes for i in stored.values())
        if not taken:
            raise SpecError(
                f"{', '.join(members)}: none of the allowed schemes fits (widths {_told(options.widths)}, group sizes "
                f"{_told(options.group_sizes)}, format {layout.name}, engine {options.engine}); allow more of them"
            )
        found.append(_Choice(block, members, taken, sum(math.prod(linears.shapes[n]) for n in members)))
    return found


def _pinned(members: Sequence[str], recipe: Recipe) -> list[Scheme]:
    """The schemes that the recipe's overrides give the item's linears."""
    by_group = recipe.method != "rtn" and recipe.gptq.act_order == "group"
    pinned = [recipe.weights_of(n) for n in members if any(matches(o.match, n) for o in recipe.overrides)]
    return list(dict.fromkeys(Scheme(w.spec, by_group, w.activations) for w in pinned))


def _schemes(members: Sequence[str], recipe: Recipe, options: AllocateOptions) -> list[Scheme]:
    pinned = _pinned(members, recipe)
    if len(pinned) > 1:
        told = " and ".join(map(str, pinned))
        raise UsageError(f"engines fuse {', '.join(members)}, so they need one scheme, but the recipe's overrides give {told}")
    if pinned:
        return pinned
    if recipe.weights.activations != "none":
        raise UsageError("an allocation chooses weight-only schemes; give linears with int8 activations an override instead")
    by_group = recipe.method != "rtn" and recipe.gptq.act_order == "group"
    allowed = _WIDTHS.get(options.engine, options.widths)
    symmetries = (True, False) if options.symmetric is None else (options.symmetric,)
    return [
        Scheme(QuantSpec(bits, None if size == -1 else size, symmetric), by_group)
        for bits in options.widths
        for size in options.group_sizes
        for symmetric in symmetries
        # A zero-point buys nothing at 8 bits: those schemes are only offered to who asks for nothing else.
        if bits != UNQUANTIZED and bits in allowed and (bits < 8 or symmetric or len(symmetries) == 1)
        if not (by_group and size == -1)
    ]


def _holds(scheme: Scheme, shape: tuple[int, int], layout: Format, engine: str) -> bool:
    size = scheme.spec.group_size
    if (size is not None and shape[1] % size) or layout.why_not(scheme, shape):
        return False
    table = _ENGINES.get(engine)
    return table is None or why_not(table, layout.name, scheme) is None


def _check_layout(
    choices: Sequence[_Choice], linears: Linears, architecture: Architecture, recipe: Recipe, layout: Format
) -> None:
    """Refuse early what the run would refuse: one allocation with as many different schemes as can be is put to the test.

    Raises:
        FormatError: the layout holds no such mix.
    """
    chosen = []
    for i, choice in enumerate(choices):
        schemes: list[Scheme | None] = [s for s in choice.sizes if s is not None] or [None]
        chosen.append(schemes[i % len(schemes)])
    if all(s is None for s in chosen):
        raise UsageError("the only width is 16, which leaves everything unquantized; allow 2, 3, 4 or 8")
    select(linears, architecture, recipe_of_choice(recipe, choices, chosen), layout)


def _budget(choices: Sequence[_Choice], target: float) -> int:
    """Bytes that the selected linears may take.

    Raises:
        UsageError: outside the possible range, which the message gives.
    """
    weights = sum(c.weights for c in choices)
    smallest, largest = _range(choices)
    if not smallest <= target < largest:
        side = "below the smallest" if target < smallest else "not below the largest"
        raise UsageError(
            f"a target of {target:g} bits per weight is {side} possible size; these choices reach from "
            f"{math.ceil(smallest * 1000) / 1000:g} to {largest:.3f}"
        )
    return math.floor(target * weights / 8)


def _range(choices: Sequence[_Choice]) -> tuple[float, float]:
    weights = sum(c.weights for c in choices)
    ends = (sum(end(c.sizes.values()) for c in choices) for end in (min, max))
    smallest, largest = (8 * nbytes / weights for nbytes in ends)
    return smallest, largest


def _decide(
    choices: Sequence[_Choice],
    damages: Sequence[Mapping[QuantSpec, Damage]],
    budget: int,
    recipe: Recipe,
    options: AllocateOptions,
    linears: Linears,
) -> Allocation:
    offers = [
        [Option(size, 0.0 if scheme is None else damage[scheme.spec].predicted) for scheme, size in choice.sizes.items()]
        for choice, damage in zip(choices, damages, strict=True)
    ]
    solution = solve(offers, budget)
    chosen = [list(c.sizes)[i] for c, i in zip(choices, solution.chosen, strict=True)]
    smallest, largest = _range(choices)
    return Allocation(
        recipe=recipe_of_choice(recipe, choices, chosen, _description(solution, choices, options)),
        items=tuple(
            _allocated(c, d, o, i) for c, d, o, i in zip(choices, damages, offers, solution.chosen, strict=True)
        ),
        target_bpw=options.target_bpw,
        bits_per_weight=8 * solution.size / sum(c.weights for c in choices),
        smallest=smallest,
        largest=largest,
        predicted=solution.cost,
        gap=solution.gap,
        unit="nats per token" if options.sensitivity == "kl" else "relative block error",
    )


def _allocated(choice: _Choice, damage: Mapping[QuantSpec, Damage], offers: Sequence[Option], index: int) -> Allocated:
    schemes = list(choice.sizes)
    scheme, mine = schemes[index], offers[index]
    larger = next((i for i in undominated(offers) if offers[i].size > mine.size), None)
    gain = None if larger is None else (mine.cost - offers[larger].cost) / ((offers[larger].size - mine.size) / 1e6)
    return Allocated(
        names=choice.names,
        scheme=scheme,
        nbytes=mine.size,
        weights=choice.weights,
        damage=mine.cost,
        layer=0.0 if scheme is None else damage[scheme.spec].layer,
        next_scheme=None if larger is None else str(schemes[larger] or "unquantized"),
        gain=gain,
    )


def _description(solution: Solution, choices: Sequence[_Choice], options: AllocateOptions) -> str:
    reached = 8 * solution.size / sum(c.weights for c in choices)
    return (
        f"allocated for at most {options.target_bpw:g} bits per weight ({reached:.4f} reached) by {options.sensitivity} "
        f"sensitivity, engine {options.engine}"
    )


def recipe_of_choice(
    recipe: Recipe, choices: Sequence[_Choice], chosen: Sequence[Scheme | None], description: str = ""
) -> Recipe:
    """The recipe that gives each item its scheme: the one with most weights for all, overrides by full name for the others."""
    votes: Counter[Scheme] = Counter()
    for choice, scheme in zip(choices, chosen, strict=True):
        if scheme is not None:
            votes[scheme] += choice.weights
    common = votes.most_common(1)[0][0]
    overrides, ignore = [], list(recipe.ignore)
    for choice, scheme in zip(choices, chosen, strict=True):
        for name in choice.names:
            if scheme is None:
                ignore.append(name)
            elif scheme != common:
                overrides.append({"match": name, **_differences(scheme, common)})
    return recipe.updated(
        {
            "description": description or recipe.description, "weights": _weights(common).model_dump(),
            "overrides": tuple(overrides), "ignore": tuple(ignore),
        }
    )  # fmt: skip


def _weights(scheme: Scheme) -> Weights:
    size = scheme.spec.group_size
    return Weights(
        bits=scheme.spec.bits,
        group_size=-1 if size is None else size,
        symmetric=scheme.spec.symmetric,
        activations=scheme.activations,
    )


def _differences(scheme: Scheme, common: Scheme) -> dict[str, object]:
    base = _weights(common).model_dump()
    return {k: v for k, v in _weights(scheme).model_dump().items() if v != base[k]}


def _told(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


__all__ = [
    "AllocateOptions",
    "Allocated",
    "Allocation",
    "allocate",
    "fused_items",
    "recipe_of_choice",
    "split_windows",
]
