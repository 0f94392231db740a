"""The recipe fitted to a model: its group sizes made to divide what it selects; see
:mod:`llmquant.formats.group_sizes`."""

from __future__ import annotations

from llmquant.formats.base import Format, Scheme
from llmquant.formats.group_sizes import fit_schemes
from llmquant.models.architectures import Architecture
from llmquant.models.reading.linears import Linears
from llmquant.models.selection import fused_items, scheme_of, sharing
from llmquant.recipe import Recipe
from llmquant.records import GroupSizeRecord


def fit_groups(
    linears: Linears, architecture: Architecture, recipe: Recipe, layout: Format
) -> tuple[Recipe, tuple[GroupSizeRecord, ...]]:
    """The recipe with group sizes that fit every linear it selects and the embeddings it packs, and
    what that changed. It says exactly what is done, so it repeats the run."""
    recipe, embeddings = _fit_embeddings(linears, recipe, layout)
    recipe, changes = _fit_linears(linears, architecture, recipe, layout)
    return recipe, (*embeddings, *changes)


def chosen_linears(
    linears: Linears, architecture: Architecture, recipe: Recipe
) -> dict[str, tuple[str, ...]]:
    """The linears that a run gives the recipe's weights → what patterns may call them.

    None outside the decoder blocks, which stay as they are, and no head that is the packed
    embeddings'.
    """
    shared = linears.shared if recipe.embeddings is not None else frozenset()
    left = {*architecture.outside, *shared}
    names = {n: linears.names(n) for n in linears.shapes if n not in left}
    return {n: known for n, known in names.items() if recipe.selects(*known)}


def _fit_embeddings(
    linears: Linears, recipe: Recipe, layout: Format
) -> tuple[Recipe, tuple[GroupSizeRecord, ...]]:
    """The part of :func:`fit_groups` for the embeddings and a head with their grid."""
    wanted = recipe.embeddings
    if wanted is None or linears.embedding is None:
        return recipe, ()
    if wanted.strict_groups:
        return recipe.updated({"embeddings.strict_groups": False}), ()
    shapes = dict([linears.embedding, *sharing(linears, recipe)])
    schemes = dict.fromkeys(shapes, Scheme(wanted.weights.spec))
    fit = fit_schemes(
        schemes, [tuple(shapes)], shapes, layout, "embeddings and head have one group size"
    )
    used = wanted.weights.with_spec(fit.schemes[linears.embedding[0]].spec)
    if not fit.changes:
        return recipe, ()
    return recipe.updated({"embeddings.group_size": used.group_size}), fit.changes


def _fit_linears(
    linears: Linears, architecture: Architecture, recipe: Recipe, layout: Format
) -> tuple[Recipe, tuple[GroupSizeRecord, ...]]:
    """The part of :func:`fit_groups` for linears."""
    if recipe.weights.strict_groups:
        return recipe.updated({"weights.strict_groups": False}), ()
    names = chosen_linears(linears, architecture, recipe)
    schemes = {n: scheme_of(recipe, recipe.weights_of(*known)) for n, known in names.items()}
    together = [items for _, items in fused_items(tuple(names), architecture)]
    fit = fit_schemes(schemes, together, linears.shapes, layout)
    if not fit.changes:
        return recipe, ()
    wanted = {
        known: recipe.weights_of(*known).with_spec(fit.schemes[n].spec)
        for n, known in names.items()
    }
    return recipe.giving(wanted), fit.changes
