"""What a run will quantize, decided before any work: every linear gets a spec or a reason why it
was left alone.

Refused here, so that nobody waits hours for it: a pattern that matches nothing, a group size that
does not divide, a scheme the format cannot hold, parts of a fused engine layer that would differ, a
tied head, a recipe that selects nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llmquant.errors import ArchitectureError, LayoutError, UsageError
from llmquant.formats.base import Format, Scheme
from llmquant.models.architectures import Architecture
from llmquant.models.reading.linears import Linears
from llmquant.recipe import Recipe, matches
from llmquant.recipe_sections import Weights
from llmquant.records import GroupSizeRecord
from llmquant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Selection:
    """What is quantized.

    Attributes:
        schemes: full module name → scheme.
        skipped: module name → why it stays as it is.
        head: the head's name, if it is quantized as a linear of its own.
        regrouped: where the group size is not the one wanted.
        embedding: that of the token embeddings, if they are.
        shared: modules whose weight is the packed embeddings': a tied head.
    """

    schemes: Mapping[str, Scheme]
    skipped: Mapping[str, str]
    head: str | None
    regrouped: tuple[GroupSizeRecord, ...] = ()
    embedding: str | None = None
    shared: frozenset[str] = frozenset()

    @property
    def specs(self) -> dict[str, QuantSpec]:
        return {name: scheme.spec for name, scheme in self.schemes.items()}


ROUTER = "router of experts"
OUTSIDE = "outside the decoder blocks"
SHARED = "its weights are the packed embeddings'"
PLACELESS = "no place in the model of config.json"

_HOLDS_ALL = "compressed-tensors"  # which has no demand on shapes


def fused_items(
    names: Sequence[str], architecture: Architecture
) -> list[tuple[int | None, tuple[str, ...]]]:
    """Block index (None for the head) and names of each set of linears that must share a scheme, in
    the order of ``names``."""
    found: dict[tuple[int | None, object], list[str]] = {}
    for name in names:
        inside = name.removeprefix(f"{architecture.blocks}.")
        index, _, leaf = inside.partition(".")
        block = int(index) if inside != name and index.isdigit() else None
        together = (architecture.fused_with(leaf) if block is not None else None) or name
        found.setdefault((block, together), []).append(name)
    return [(block, tuple(members)) for (block, _), members in found.items()]


def select(
    linears: Linears, architecture: Architecture, recipe: Recipe, layout: Format
) -> Selection:
    """Give every linear a scheme or a reason why it stays as it is.

    Raises:
        UsageError: nothing selected, a pattern without a match, a tied head selected without its
            embeddings.
        SpecError: a group size that does not divide; names the module and sizes that do.
        FormatError: a scheme the layout cannot hold.
        ArchitectureError: a selected linear outside blocks and head, or embeddings that cannot be
            packed.
    """
    _check_patterns(recipe, linears)
    head = linears.head
    table = _embedding(linears, recipe, layout)
    shared = linears.shared if table else frozenset()
    schemes: dict[str, Scheme] = {}
    skipped: dict[str, str] = dict.fromkeys(linears.routers, ROUTER)
    skipped |= linears.left
    skipped |= {n: f"a {kind}, not a plain Linear" for n, kind in linears.strange.items()}
    skipped |= dict.fromkeys(linears.placeless, PLACELESS)
    for name in linears.shapes:
        weights = _weights(recipe, linears, name)
        if name in shared:
            skipped[name] = SHARED
        elif weights is None:
            skipped[name] = _why_skipped(recipe, linears.names(name))
        elif name in architecture.outside:
            skipped[name] = OUTSIDE
        elif name == head and linears.tied:
            raise UsageError(
                f"{name} shares its weights with the embeddings, which stay unquantized; add it to --ignore, or pack "
                "both with --embeddings 8"
            )
        else:
            schemes[name] = scheme_of(recipe, weights)
    _check_held(schemes, linears, architecture, layout)
    for name, scheme in schemes.items():
        columns = _columns(linears, recipe, architecture)
        scheme.spec.check(linears.shapes[name][1], name, columns, g_idx=scheme.g_idx)
    _check_any(schemes, table, linears, architecture)
    _check_places(schemes, architecture, head)
    unlike = next(unlike_fused(schemes, skipped, architecture), None)
    if unlike is not None:
        raise UsageError(
            f"engines fuse these linears, so they need one scheme, but the recipe gives {unlike}"
        )
    schemes = table | schemes
    _check_mix(layout, schemes, skipped)
    return Selection(
        schemes,
        skipped,
        head if head in schemes else None,
        embedding=next(iter(table), None),
        shared=shared,
    )


def _embedding(linears: Linears, recipe: Recipe, layout: Format) -> dict[str, Scheme]:
    """The embeddings' scheme by their name, if the recipe packs them."""
    if recipe.embeddings is None:
        return {}
    if linears.embedding is None or linears.unpackable is not None:
        why = linears.unpackable or "the model has no token embeddings that could be packed"
        raise ArchitectureError(f"{why}; leave out --embeddings")
    name, shape = linears.embedding
    scheme = Scheme(recipe.embeddings.weights.spec)
    _check_mix(layout, {name: scheme})
    reason = layout.why_not(scheme, shape)
    if reason:
        raise LayoutError(f"{name}: format {layout.name} cannot hold {scheme.spec}: {reason}")
    columns = (width for _, (_, width) in sharing(linears, recipe))
    scheme.spec.check(
        shape[1], name, columns, otherwise="leave out strict_groups of the recipe's embeddings"
    )
    return {name: scheme}


def sharing(linears: Linears, recipe: Recipe) -> Iterator[tuple[str, tuple[int, int]]]:
    """A head of its own that has the embeddings' grid, and its shape."""
    head = linears.head
    if head is None or linears.tied or recipe.selects(*linears.names(head)):
        return
    if _weights(recipe, linears, head) is not None:
        yield head, linears.shapes[head]


def _check_mix(
    layout: Format, schemes: Mapping[str, Scheme], skipped: Collection[str] = ()
) -> None:
    """Raises LayoutError where a layout cannot hold modules together."""
    mixed = layout.why_not_together(schemes, skipped)
    if mixed:
        raise LayoutError(f"format {layout.name} cannot hold this recipe's mix: {mixed}")


def _check_held(
    schemes: Mapping[str, Scheme], linears: Linears, architecture: Architecture, layout: Format
) -> None:
    """Raises LayoutError for linears that the layout cannot hold. Where the group size does not
    divide either, another one is no way out, and the message says which ways there are."""
    shapes = linears.shapes
    reasons = {n: r for n, s in schemes.items() if (r := layout.why_not(s, shapes[n]))}
    if not reasons:
        return
    name, reason = next(iter(reasons.items()))
    scheme = schemes[name]
    row = Scheme(replace(scheme.spec, group_size=None), activations=scheme.activations)
    other = layout.why_not(row, shapes[name]) is None
    ways = [] if layout.name == _HOLDS_ALL else [f"use --format {_HOLDS_ALL}"]
    together = [names for _, names in fused_items(tuple(schemes), architecture)]
    refused = [n for names in together if not reasons.keys().isdisjoint(names) for n in names]
    if len(refused) < len(schemes):
        leaves = dict.fromkeys(n.rpartition(".")[2] for n in refused)
        ways.append(f"leave out what it cannot hold ({' '.join(f'--ignore {n}' for n in leaves)})")
    if other or not ways or scheme.spec.divides(shapes[name][1]):
        raise LayoutError(f"{name}: format {layout.name} cannot hold {scheme.spec}: {reason}")
    raise LayoutError(
        f"{name}: format {layout.name} cannot hold this linear in any group size: {reason}; {' or '.join(ways)}"
    )


def _weights(recipe: Recipe, linears: Linears, name: str) -> Weights | None:
    """The grid of a linear, None where it stays as it is."""
    names = linears.names(name)
    if name == linears.head and not linears.tied:
        return recipe.head_weights(*names)
    return recipe.weights_of(*names) if recipe.selects(*names) else None


def _columns(linears: Linears, recipe: Recipe, architecture: Architecture) -> Iterator[int]:
    """Input columns of the linears whose group size is the recipe's own."""
    for name, (_, columns) in linears.shapes.items():
        names = linears.names(name)
        chosen = recipe.selects(*names) and name not in architecture.outside
        if chosen and recipe.weights_of(*names) == recipe.weights:
            yield columns


def scheme_of(recipe: Recipe, weights: Weights) -> Scheme:
    """What the recipe makes of a linear with these weights."""
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
        others = (*linears.routers, *linears.left, *linears.strange, *linears.placeless)
        known = [*names, *others] if pattern in recipe.ignore else names
        if not any(matches(pattern, name) for name in known):
            some = ", ".join(list(linears.shapes)[:3])
            raise UsageError(
                f"pattern {pattern!r} matches none of the model's {len(linears.shapes)} linears (such as {some})"
            )


def _check_any(
    schemes: Mapping[str, Scheme],
    table: Mapping[str, Scheme],
    linears: Linears,
    architecture: Architecture,
) -> None:
    """Raises ArchitectureError or UsageError where nothing would be quantized."""
    inside = [n for n in linears.strange if _block_of(n, architecture)]
    plain = any(_block_of(n, architecture) for n in linears.shapes)
    if inside and not plain:
        raise ArchitectureError(
            f"the blocks' matrices are in {linears.strange[inside[0]]} modules (such as {inside[0]}), which llmquant and "
            "engines do not read packed; only models of plain Linear layers can be quantized"
        )
    if not schemes and not plain:
        raise ArchitectureError(
            "the model of config.json has no decoder blocks with linears (num_hidden_layers is 0 or less?)"
        )
    if not schemes and not table:
        raise UsageError(
            f"the recipe selects none of the model's {len(linears.shapes)} linears; check --include and --ignore"
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


def unlike_fused(
    schemes: Mapping[str, Scheme], skipped: Mapping[str, str], architecture: Architecture
) -> Iterator[str]:
    """The sets of linears that engines fuse and that have several schemes, in words."""
    for block, names in fused_items((*schemes, *skipped), architecture):
        firsts = {schemes.get(n): n for n in reversed(names)}
        if block is not None and len(firsts) > 1:
            listed = names if len(names) < 5 else sorted(firsts.values(), key=names.index)
            plain = {n: f"unquantized ({why})" for n, why in skipped.items()}
            yield ", ".join(f"{n}: {schemes.get(n) or plain[n]}" for n in listed)
