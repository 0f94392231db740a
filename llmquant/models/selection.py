"""What a run will quantize, decided before any work: every linear gets a spec or a reason why it
was left alone.

Refused here, so that nobody waits hours for it: a pattern that matches nothing, a group size that
does not divide, a scheme the format cannot hold, parts of a fused engine layer that would differ, a
tied head, a recipe that selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from llmquant.errors import ArchitectureError, LayoutError, UsageError
from llmquant.formats.base import Format, Scheme
from llmquant.models.architectures import Architecture, has_matrix
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
PLACELESS = "no place in the model of config.json"


@dataclass(frozen=True, slots=True)
class Linears:
    """A model's linears.

    Attributes:
        shapes: full name → (out, in).
        head: its name, if it has one.
        tied: whether the head shares the embeddings' weights.
        routers: what chooses experts; never quantized, since a wrong choice costs more than these
            few weights.
        strange: modules with a matrix that is no plain Linear's → their class.
        placeless: modules of the folder that the model has no place for.
    """

    shapes: Mapping[str, tuple[int, int]]
    head: str | None
    tied: bool
    routers: tuple[str, ...] = ()
    strange: Mapping[str, str] = field(default_factory=dict)
    placeless: tuple[str, ...] = ()

    def names(self, linear: str) -> tuple[str, ...]:
        """What patterns may call a linear: a head is also ``lm_head``, whatever the checkpoint
        calls it."""
        return (linear,) if linear != self.head else tuple(dict.fromkeys((linear, HEAD)))


def linears_of(model: PreTrainedModel, placeless: tuple[str, ...] = ()) -> Linears:
    """The linears of a (meta) model.

    Only plain ones: whoever reads a packed folder puts a packed layer in the place of an
    ``nn.Linear``, and leaves its subclasses, which may compute something else, as they are.
    """
    found = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    head = next((n for n, m in found.items() if m is model.get_output_embeddings()), None)
    shapes = {n: (m.out_features, m.in_features) for n, m in found.items()}
    routers = tuple(_routers(model))
    shapes = {n: shape for n, shape in shapes.items() if n not in routers}
    strange = {n: type(m).__name__ for n, m in model.named_modules() if has_matrix(m)}
    strange = {n: kind for n, kind in strange.items() if n not in (*found, *routers)}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return Linears(shapes, head, tied, routers, strange, placeless)


def _routers(model: nn.Module) -> Iterator[str]:
    """What stands beside a list of experts and has a row for each, or one that weighs an expert for
    all tokens."""
    for name, module in model.named_modules():
        lists = [m for m in module.children() if isinstance(m, ExpertList)]
        for child, beside in module.named_children() if lists else ():
            if beside in lists:
                continue
            for inner, m in beside.named_modules(prefix=f"{name}.{child}".lstrip(".")):
                matrices = [p for p in m.parameters(recurse=False) if p.ndim == 2]
                if any(p.shape[0] in (1, len(lists[0])) for p in matrices):
                    yield inner


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
    skipped |= {n: f"a {kind}, not a plain Linear" for n, kind in linears.strange.items()}
    skipped |= dict.fromkeys(linears.placeless, PLACELESS)
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
    inside = [n for n in linears.strange if _block_of(n, architecture)]
    if inside and not any(_block_of(n, architecture) for n in linears.shapes):
        raise ArchitectureError(
            f"the blocks' matrices are in {linears.strange[inside[0]]} modules (such as {inside[0]}), which llmquant and "
            "engines do not read packed; only models of plain Linear layers can be quantized"
        )
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
        # What stays as it is may be ignored by a pattern; any other pattern would not have its way.
        others = (*linears.routers, *linears.strange, *linears.placeless)
        known = [*names, *others] if pattern in recipe.ignore else names
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
