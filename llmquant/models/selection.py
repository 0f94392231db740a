"""What a run will quantize, decided before any work: every linear gets a spec or a reason why it
was left alone.

Refused here, so that nobody waits hours for it: a pattern that matches nothing, a group size that
does not divide, a scheme the format cannot hold, parts of a fused engine layer that would differ, a
tied head, a recipe that selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from llmquant.errors import ArchitectureError, LayoutError, UsageError
from llmquant.formats.base import Format, Scheme
from llmquant.models.architectures import Architecture
from llmquant.models.experts import ExpertList
from llmquant.recipe import Recipe, matches
from llmquant.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Selection:
    """Full module name → scheme, module name → why it stays as it is, and the head's name if it is
    selected."""

    schemes: Mapping[str, Scheme]
    skipped: Mapping[str, str]
    head: str | None

    @property
    def specs(self) -> dict[str, QuantSpec]:
        return {name: scheme.spec for name, scheme in self.schemes.items()}


HEAD = "lm_head"
ROUTER = "router of experts"
OUTSIDE = "outside the decoder blocks"


@dataclass(frozen=True, slots=True)
class Linears:
    """A model's linears.

    Attributes:
        shapes: full name → (out, in).
        head: its name, if it has one.
        tied: whether the head shares the embeddings' weights.
        routers: what chooses experts; never quantized, since a wrong choice costs more than these
            few weights.
    """

    shapes: Mapping[str, tuple[int, int]]
    head: str | None
    tied: bool
    routers: tuple[str, ...] = ()

    def names(self, linear: str) -> tuple[str, ...]:
        """What patterns may call a linear: a head is also ``lm_head``, whatever the checkpoint
        calls it."""
        return (linear,) if linear != self.head else tuple(dict.fromkeys((linear, HEAD)))


def linears_of(model: PreTrainedModel) -> Linears:
    """The linears of a (meta) model."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = next((n for n, m in found.items() if m is model.get_output_embeddings()), None)
    shapes = {n: (m.out_features, m.in_features) for n, m in found.items()}
    routers = tuple(
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if any(isinstance(m, ExpertList) for m in module.children())
        for child, m in module.named_children()
        if not isinstance(m, nn.Linear) and any(p.ndim == 2 for p in m.parameters(recurse=False))
    )
    return Linears(shapes, head, bool(getattr(model.config, "tie_word_embeddings", False)), routers)


def select(
    linears: Linears, architecture: Architecture, recipe: Recipe, layout: Format
) -> Selection:
    """Give every linear a scheme or a reason why it stays as it is.

    Raises:
        UsageError: nothing selected, a pattern without a match, a tied head selected.
        SpecError: a group size that does not divide; names the module and sizes that do.
        FormatError: a scheme the layout cannot hold.
        ArchitectureError: a selected linear outside blocks and head.
    """
    _check_patterns(recipe, linears)
    head = linears.head
    schemes: dict[str, Scheme] = {}
    skipped: dict[str, str] = dict.fromkeys(linears.routers, ROUTER)
    for name, shape in linears.shapes.items():
        if not recipe.selects(*linears.names(name)):
            skipped[name] = _why_skipped(recipe, linears.names(name))
            continue
        if name in architecture.outside:
            skipped[name] = OUTSIDE
            continue
        if name == head and linears.tied:
            raise UsageError(
                f"{name} shares its weights with the embeddings, which stay unquantized; add it to --ignore"
            )
        scheme = _scheme(recipe, linears.names(name))
        scheme.spec.check(shape[1], name, _columns(linears, recipe, architecture))
        reason = layout.why_not(scheme, shape)
        if reason:
            raise LayoutError(f"{name}: format {layout.name} cannot hold {scheme.spec}: {reason}")
        schemes[name] = scheme
    if not schemes:
        raise UsageError(
            f"the recipe selects none of the model's {len(linears.shapes)} linears; check --include and --ignore"
        )
    _check_places(schemes, architecture, head)
    _check_fused(schemes, skipped, architecture)
    mixed = layout.why_not_together(schemes, skipped)
    if mixed:
        raise LayoutError(f"format {layout.name} cannot hold this recipe's mix: {mixed}")
    return Selection(schemes, skipped, head if head in schemes else None)


def _columns(linears: Linears, recipe: Recipe, architecture: Architecture) -> Iterator[int]:
    """Input columns of the linears whose group size is the recipe's own."""
    for name, (_, columns) in linears.shapes.items():
        names = linears.names(name)
        chosen = recipe.selects(*names) and name not in architecture.outside
        if chosen and recipe.weights_of(*names) == recipe.weights:
            yield columns


def _scheme(recipe: Recipe, names: tuple[str, ...]) -> Scheme:
    weights = recipe.weights_of(*names)
    by_group = recipe.method == "gptq" and recipe.gptq.act_order == "group"
    return Scheme(weights.spec, g_idx=by_group, activations=weights.activations)


def _why_skipped(recipe: Recipe, names: tuple[str, ...]) -> str:
    pattern = next((p for p in recipe.ignore if any(matches(p, n) for n in names)), None)
    return (
        f"ignore pattern {pattern}"
        if pattern
        else f"no include pattern of {', '.join(recipe.include)} matches"
    )


def _check_patterns(recipe: Recipe, linears: Linears) -> None:
    names = [n for name in linears.shapes for n in linears.names(name)]
    # A default such as lm_head may be absent from a model; a pattern somebody wrote should not be.
    default = Recipe.model_fields["ignore"].default
    written = (
        *recipe.include,
        *(p for p in recipe.ignore if p not in default),
        *(o.match for o in recipe.overrides),
    )
    for pattern in written:
        # Routers stay as they are, so a pattern that ignores them has its way; any other would not.
        known = [*names, *linears.routers] if pattern in recipe.ignore else names
        if not any(matches(pattern, name) for name in known):
            some = ", ".join(list(linears.shapes)[:3])
            raise UsageError(
                f"pattern {pattern!r} matches none of the model's {len(linears.shapes)} linears (such as {some})"
            )


def _check_places(
    schemes: Mapping[str, Scheme], architecture: Architecture, head: str | None
) -> None:
    for name in schemes:
        if name != head and _block_of(name, architecture) is None:
            raise ArchitectureError(
                f"{name} is neither in a decoder block nor the head; add it to --ignore"
            )


def _block_of(name: str, architecture: Architecture) -> str | None:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    inside = name.removeprefix(f"{architecture.blocks}.")
    return None if inside == name else f"{architecture.blocks}.{inside.partition('.')[0]}"


def _check_fused(
    schemes: Mapping[str, Scheme], skipped: Mapping[str, str], architecture: Architecture
) -> None:
    sets: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in (*schemes, *skipped):
        block = _block_of(name, architecture)
        together = architecture.fused_with(name.removeprefix(f"{block}.")) if block else None
        if block and together:
            sets.setdefault((block, together), []).append(name)
    for names in sets.values():
        firsts = {schemes.get(n): n for n in reversed(names)}
        if len(firsts) > 1:
            listed = names if len(names) < 5 else sorted(firsts.values(), key=names.index)
            kinds = ", ".join(f"{n}: {schemes.get(n, 'unquantized')}" for n in listed)
            raise UsageError(
                f"engines fuse these linears, so they need one scheme, but the recipe gives {kinds}"
            )
