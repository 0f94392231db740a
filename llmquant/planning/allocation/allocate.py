"""allocate: which width and group size each linear gets, so that a model of a given size loses as
little as possible.

Three steps. Every item (linears that engines fuse, else one linear) and every scheme that layout
and engine can hold becomes an option with its bytes, which are those the layout really writes
(:class:`llmquant.checkpoint.sizes.Sizes`: zero-points, scales and padding included).
:mod:`.sensitivity` says what each option costs in quality, from one pass through the model.
:mod:`.knapsack` picks one option per item within the budget, with a proof of how near to the
optimum it is.

The budget is ``target_bpw`` bits times the weights of all linears that the recipe selects. A linear
that keeps its 16 bits counts with them, though the result then calls it unquantized; so
``bits_per_weight`` here is over all selected linears, while a manifest's is over the packed ones
alone.

The outcome is a recipe: the most common scheme as ``weights``, an override for each linear that
differs, the 16-bit ones under ``ignore``. It says everything, so it can be read, edited and run
again without this module. Overrides of the recipe that one starts from are kept: they pin their
linears (and those fused with them).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmquant.data.calibration import Calibration
from llmquant.errors import SourceError, UsageError
from llmquant.formats import Scheme
from llmquant.formats.base import is_expert
from llmquant.models.block_inputs import refuse_walk
from llmquant.planning.allocation.budget import budget_of, span_of
from llmquant.planning.allocation.candidates import Choice, choices_of
from llmquant.planning.allocation.chosen import check_layout, recipe_of_choice
from llmquant.planning.allocation.knapsack import Option, Solution, solve, solve_alike, undominated
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.allocation.quality_loss import Damage
from llmquant.planning.allocation.saved import SavedMeasurements
from llmquant.planning.allocation.sensitivity import Item, Probe, measure
from llmquant.quantization.options import Events
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.prepare import calibration_of, deterministic, prepare
from llmquant.quantization.state.fingerprint import Facts, run_facts
from llmquant.recipe import Recipe
from llmquant.spec import QuantSpec


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


def allocate(
    model: str | os.PathLike[str],
    recipe: Recipe,
    options: AllocateOptions,
    events: Events | None = None,
) -> Allocation:
    """Choose a scheme for every linear that the recipe selects.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        recipe: method, patterns, calibration and format; its overrides pin linears, its ``weights``
            are replaced.
        options: the budget and what may be chosen.
        events: callbacks.

    Raises:
        UsageError: a target outside what is possible (with the range), no calibration text, or what
            ``quantize`` refuses.
        FormatError: the layout cannot hold a mix.
        CheckpointError, ArchitectureError, QuantizationError: as in ``quantize``.
    """
    events = events or Events()
    if recipe.calibration.source is None:
        raise SourceError(
            "an allocation measures on text: give --calibration file:PATH, jsonl:PATH#FIELD or hf:…"
        )
    plan = prepare(model, recipe, options.device, options.dtype, options.store_dtype)
    refuse_walk(plan.model, "so no schemes can be chosen for a size: give --bits with --method rtn")
    choices = choices_of(plan, options)
    check_layout(choices, plan)
    budget = budget_of(choices, options.target_bpw)
    calibration = calibration_of(plan, options.evaluation)
    assert calibration is not None
    events.on_calibration(calibration)
    items = [
        Item(c.block, c.names, tuple(s.spec for s in c.sizes if s is not None)) for c in choices
    ]
    seen, unseen = split_windows(calibration.windows, options.probe_tokens)
    done = SavedMeasurements(
        options.state, _facts(plan, calibration, options), items, restart=options.restart
    )
    if done.known:
        events.on_note(f"{len(done.known)} of {len(items)} measurements were saved; resuming")
    left = {i: item for i, item in enumerate(items) if i not in done.known}
    probe = Probe(options.sensitivity, unseen)
    with deterministic(recipe.seed), done:
        for i, damage in measure(plan, left, seen, probe, events.on_progress):
            done.add(i, damage)
    damages = [done.known[i] for i in range(len(items))]
    return _decide(choices, damages, budget, plan.recipe, options)


def _facts(plan: WalkPlan, calibration: Calibration, options: AllocateOptions) -> Facts:
    """What the measurements depend on; how large the result may be is not among it."""
    facts = run_facts(plan.reader, plan.recipe, calibration, plan.device, plan.dtype)
    asked = ("widths", "group_sizes", "symmetric", "engine", "sensitivity", "probe_tokens")
    return facts | {name.replace("_", " "): str(getattr(options, name)) for name in asked}


def split_windows(
    windows: Sequence[torch.Tensor], tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows to round by, and the last ones, of at least ``tokens`` tokens together but at most
    half of all, to measure on.

    GPTQ's errors are smaller on the windows it has seen, and the more so the wider a linear is:
    measured there, wide ones would look better than they will be. A single window serves for both.
    """
    taken, count = 0, 0
    while count < tokens and taken < len(windows) // 2:
        taken += 1
        count += windows[-taken].numel()
    taken = max(taken, 1)
    return list(windows[:-taken] or windows), list(windows[-taken:])


def _decide(
    choices: Sequence[Choice],
    damages: Sequence[Mapping[QuantSpec, Damage]],
    budget: int,
    recipe: Recipe,
    options: AllocateOptions,
) -> Allocation:
    offers = [
        [
            Option(size, 0.0 if scheme is None else damage[scheme.spec].predicted)
            for scheme, size in choice.sizes.items()
        ]
        for choice, damage in zip(choices, damages, strict=True)
    ]
    # transformers reads all experts by one scheme.
    alike = options.engine == "transformers"
    experts = {i: list(c.sizes) for i, c in enumerate(choices) if alike and is_expert(c.names[0])}
    try:
        solution = solve_alike(offers, budget, experts) if experts else solve(offers, budget)
    except UsageError as e:
        if not experts:
            raise
        raise UsageError(
            f"{e}; transformers reads all experts by one scheme: raise the target"
        ) from e
    chosen = [list(c.sizes)[i] for c, i in zip(choices, solution.chosen, strict=True)]
    smallest, largest = span_of(choices)
    return Allocation(
        recipe=recipe_of_choice(recipe, choices, chosen, _description(solution, choices, options)),
        items=tuple(
            _allocated(c, d, o, i)
            for c, d, o, i in zip(choices, damages, offers, solution.chosen, strict=True)
        ),
        target_bpw=options.target_bpw,
        bits_per_weight=8 * solution.size / sum(c.weights for c in choices),
        smallest=smallest,
        largest=largest,
        predicted=solution.cost,
        gap=solution.gap,
        unit="nats per token" if options.sensitivity == "kl" else "relative block error",
    )


def _allocated(
    choice: Choice, damage: Mapping[QuantSpec, Damage], offers: Sequence[Option], index: int
) -> Allocated:
    schemes = list(choice.sizes)
    scheme, mine = schemes[index], offers[index]
    larger = next((i for i in undominated(offers) if offers[i].size > mine.size), None)
    gain = (
        None
        if larger is None
        else (mine.cost - offers[larger].cost) / ((offers[larger].size - mine.size) / 1e6)
    )
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


def _description(solution: Solution, choices: Sequence[Choice], options: AllocateOptions) -> str:
    reached = 8 * solution.size / sum(c.weights for c in choices)
    return (
        f"allocated for at most {options.target_bpw:g} bits per weight ({reached:.4f} reached) by {options.sensitivity} "
        f"sensitivity, engine {options.engine}"
    )
