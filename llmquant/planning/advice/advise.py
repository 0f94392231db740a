"""A recommendation: what fits the machine, what it is expected to lose, what is fast there, and
what to try first.

The field's rule of thumb: define the acceptable loss, measure the original, try post-training
quantization, from there to finer grids, 8 bits, or 16. Sizes are the plan's,
as they are once the model is loaded. The
expected loss is of another model of the size class (:mod:`llmquant.planning.costs`), which ``eval``
replaces by a measurement. Speeds are measured where the target is this machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmquant.checkpoint.hub import resolve
from llmquant.errors import (
    ArchitectureError,
    LayoutError,
    LlmquantError,
    RecipeError,
    SpecError,
    UsageError,
)
from llmquant.models.from_folder import context_length, read_config
from llmquant.planning.advice.target import Target
from llmquant.planning.advice.widths import WidthSpeed, measure_widths
from llmquant.planning.costs import Cost
from llmquant.planning.defaults import CLOSE, DefaultRecipe, choose_recipe
from llmquant.planning.forecast import cache_bytes, loaded_bytes
from llmquant.planning.preview import Plan, make_plan
from llmquant.recipe import Recipe, load_recipe
from llmquant.runtime.devices import AUTO, parse_dtype
from llmquant.runtime.host import threads
from llmquant.spec import QuantSpec

ORIGINAL = "original"
_CONTEXT = 4096
_WIDTH = 4096  # of the linears by which bits per weight of recipes are compared
_FORMAT = "compressed-tensors"
_FINER = (
    "gptq-w4g32-asym",
    "best-w4g128",
    "best-w4g32-asym",
    "gptq-w8",
)  # what to try where the first misses
_SMALLER = ("gptq-w3g32", "best-w2g32")


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run the model.

    Attributes:
        name: of the recipe, or ``original``.
        scheme: of its linears.
        weight_bytes: in memory.
        total_bytes: with the cache and the process.
        cost: expected, of the size class's model; None: not measured.
        speed: measured here; None: not measured.
        engines: serving engine → why it refuses.
    """

    name: str
    scheme: str
    weight_bytes: int
    total_bytes: int
    fits: bool
    cost: Cost | None
    speed: WidthSpeed | None
    engines: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do.

    Attributes:
        default: of this model, with its size class.
        dtype: that the model computes in there.
        cache_bytes: keys and values, or states, of all contexts; see
            :func:`llmquant.planning.forecast.cache_bytes`.
        refused: recipe → why this model cannot have it.
        first: the option to try first; None: nothing fits.
        why: of that.
        then: the options to try after it, in order.
        busy: whether other programs keep the processor busy, so that speeds are not measured, or if
            they had to be, may be wrong.
    """

    model_type: str
    default: DefaultRecipe
    target: Target
    context: int
    batch_size: int
    dtype: str
    cache_bytes: int
    options: tuple[Option, ...]
    refused: Mapping[str, str]
    first: Option | None
    why: str
    then: tuple[str, ...]
    busy: bool


def advise(
    model: str | os.PathLike[str],
    target: Target,
    *,
    context: int | None = None,
    batch_size: int = 1,
    max_kl: float = CLOSE,
    measure: bool | None = None,
) -> Advice:
    """Advice on a decoder; :func:`llmquant.planning.advice.kinds.other_kind` is to be asked
    before.

    Args:
        context: tokens of each of ``batch_size`` sequences; None: 4096, or what the model takes.
        max_kl: acceptable loss in nats per token.
        measure: time packed linears, if the target is this machine's CPU; None: if it is quiet,
            since threads that wait for each other lose far more than their share of the time.

    Raises:
        UsageError: a context beyond the model's; what :func:`make_plan` raises.
    """
    path, config = resolve(model), read_config(model)
    context = _context(config, context)
    default = choose_recipe(path, _FORMAT)
    busy = os.getloadavg()[0] > threads() / 2  # before this adds to it
    dtype = parse_dtype(AUTO, target.device).dtype
    cache = cache_bytes(config, context, batch_size, dtype)
    plans, refused = _plans(path, default)
    wanted = not busy if measure is None else measure
    speeds = _speeds(plans, target, dtype) if wanted else {}
    taken = cache + target.floor_bytes
    options = (
        _original(default.parameters, taken, target, dtype),
        *(
            _option(n, p, loaded_bytes(p, dtype), taken, target, default, speeds)
            for n, p in plans.items()
        ),
    )
    first, why = _first(options, default, max_kl)
    return Advice(
        model_type=str(config.model_type),
        default=default,
        target=target,
        context=context,
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
        cache_bytes=cache,
        options=options,
        refused=refused,
        first=first,
        why=why,
        then=_then(options, first, default),
        busy=busy and measure is not False,
    )


def _context(config: PreTrainedConfig, wanted: int | None) -> int:
    most = context_length(config)
    if wanted is None:
        return min(_CONTEXT, most) if most else _CONTEXT
    if most and wanted > most:
        raise UsageError(f"--context {wanted}: the model takes {most} tokens; give at most that")
    return wanted


def _recipes(default: DefaultRecipe) -> dict[str, Recipe]:
    """From 8 bits down; the default among them, and with its embeddings in 8 bits."""
    wider = load_recipe("gptq-w8")
    four, finer = {default.name: default.recipe}, load_recipe("gptq-w4g32-asym")
    if default.recipe.weights != finer.weights:
        four = {"gptq-w4g32-asym": finer, **four}
    small = default.recipe.updated({"embeddings": {"bits": 8}})
    return {
        "gptq-w8": wider,
        **four,
        f"{default.name} --embeddings 8": small,
        **{name: load_recipe(name) for name in _SMALLER},
    }


def _plans(path: Path, default: DefaultRecipe) -> tuple[dict[str, Plan], dict[str, str]]:
    """By recipe, and why others cannot be planned; raises the first reason if none can."""
    plans: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    errors: list[LlmquantError] = []
    for name, recipe in _recipes(default).items():
        try:
            plans[name] = make_plan(path, recipe, AUTO)  # as the commands store it
        except (ArchitectureError, LayoutError, RecipeError, SpecError) as e:
            errors.append(e)
            refused[name] = str(e)
    if not plans:
        raise errors[0]
    return plans, refused


def _option(
    name: str,
    plan: Plan,
    weights: int,
    taken: int,
    target: Target,
    default: DefaultRecipe,
    speeds: Mapping[QuantSpec, WidthSpeed],
) -> Option:
    """A recipe; ``taken`` is what the model needs beside the bytes of its ``weights``."""
    total = weights + taken
    return Option(
        name=name,
        scheme=", ".join(sorted({str(m.scheme) for m in plan.modules})),
        weight_bytes=weights,
        total_bytes=total,
        fits=total <= target.memory_bytes,
        cost=default.size_class.costs.get(name),
        speed=speeds.get(plan.linears[0].scheme.spec),
        engines=plan.engines,
    )


def _speeds(
    plans: Mapping[str, Plan], target: Target, dtype: torch.dtype
) -> Mapping[QuantSpec, WidthSpeed]:
    if not target.here or target.device != "cpu":
        return {}
    linears = next(iter(plans.values())).linears
    shape = max((m.shape for m in linears), key=lambda s: s[0] * s[1])
    return measure_widths(shape, (p.linears[0].scheme.spec for p in plans.values()), dtype)


def _original(parameters: int, taken: int, target: Target, dtype: torch.dtype) -> Option:
    """The model as it is, its weights converted to the dtype that is computed in."""
    weights = parameters * dtype.itemsize
    return Option(
        name=ORIGINAL,
        scheme=str(dtype).removeprefix("torch."),
        weight_bytes=weights,
        total_bytes=weights + taken,
        fits=weights + taken <= target.memory_bytes,
        cost=None,
        speed=None,
        engines={},
    )


def _first(
    options: Sequence[Option], default: DefaultRecipe, max_kl: float
) -> tuple[Option | None, str]:
    """The smallest that fits and is expected to be close enough; else the default, or what fits."""
    quantized = [o for o in options if o.fits and o.name != ORIGINAL]
    if not quantized:
        return None, "nothing fits: lower --context or --batch-size, or take a smaller model"
    close = [o for o in quantized if o.cost is not None and o.cost.kl <= max_kl]
    if close:
        first = min(close, key=lambda o: o.weight_bytes)
        return first, f"the smallest that fits with an expected KL of at most {max_kl:g}"
    own = next((o for o in quantized if o.name == default.name), None)
    if own is None:
        return max(quantized, key=lambda o: o.weight_bytes), "the largest that fits"
    if own.cost is None:
        return own, f"the default; {default.size_class.how}"
    return own, f"the default; at 4 bits nothing measured reaches a KL of {max_kl:g} at this size"


def _then(
    options: Sequence[Option], first: Option | None, default: DefaultRecipe
) -> tuple[str, ...]:
    """What to try if the first misses the bound: what is closer, then the original."""
    if first is None:
        return ()
    fitting = {o.name for o in options if o.fits}
    finer = [
        n
        for n in _FINER
        if n != first.name
        and (n in fitting or n.startswith("best-"))
        and _closer(n, first, default.size_class.costs)
    ]
    return (*finer, *([ORIGINAL] if ORIGINAL in fitting else []))


def _closer(name: str, first: Option, costs: Mapping[str, Cost]) -> bool:
    """Whether a recipe is expected to lose less; where that was not measured, whether it has as
    many bits."""
    if first.cost is not None and name in costs:
        return costs[name].kl < first.cost.kl
    ours, its = (
        load_recipe(n).weights.spec.bits_per_weight(_WIDTH) for n in (name, first.name.split()[0])
    )
    return ours >= its
