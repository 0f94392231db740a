"""Group sizes that fit: what becomes of a wanted group size on linears that it does not divide.

The wanted size is taken wherever it divides a linear's input columns. Elsewhere it becomes the
largest of :data:`SIZES` below it that does: engines take groups of 32, 64 and 128 and no other
divisor, and a scale for fewer than 32 weights costs more than half a bit per weight. Where none of
them divides, a row has one scale, which always fits. Linears that engines fuse get one size, all
experts of a block too. A layout with one size for all linears (AWQ) gives all of them the largest
that fits all. Token embeddings are fitted like linears, together with a head of the same grid.

A size that the layout refuses for another reason, and one for which nothing else fits, is left as
it is: whoever looks at the schemes next says why it cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmquant.formats.base import Format, Scheme, is_embedding
from llmquant.recipe import numberless
from llmquant.records import GroupSizeRecord

SIZES = (128, 64, 32)
"""Largest first: what engines take on GPUs and CPUs alike, in every layout."""

_FUSED = "engines fuse them with linears of other widths"

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fit:
    """Every linear's scheme (full name → scheme), and what was changed, for people and records."""

    schemes: Mapping[str, Scheme]
    changes: tuple[GroupSizeRecord, ...] = ()


def fit_scheme(scheme: Scheme, shapes: Sequence[Shape], layout: Format) -> Scheme:
    """The scheme with the group size that fits linears ``[out, in]`` that have to share one."""
    wanted = scheme.spec.group_size
    common = math.gcd(*(columns for _, columns in shapes))
    if wanted is None or scheme.spec.divides(common):
        return scheme
    for size in (*(s for s in SIZES if s < wanted and common % s == 0), None):
        fitting = _sized(scheme, size)
        if all(layout.why_not(fitting, shape) is None for shape in shapes):
            return fitting
    return scheme


def fit_schemes(
    schemes: Mapping[str, Scheme],
    together: Iterable[Sequence[str]],
    shapes: Mapping[str, Shape],
    layout: Format,
    why_one: str = _FUSED,
) -> Fit:
    """Fit the group sizes of all linears.

    Args:
        schemes: wanted, by full name.
        together: the same names in sets that share a scheme.
        shapes: ``(out, in)`` by full name.
        layout: that is to hold them.
        why_one: why a set shares one.
    """
    fitting, reasons = dict(schemes), dict.fromkeys(schemes, "")
    for names in together:
        # A set with several schemes is refused elsewhere; here each of them is fitted alone.
        for wanted in dict.fromkeys(schemes[n] for n in names):
            same = [n for n in names if schemes[n] == wanted]
            fitted = fit_scheme(wanted, [shapes[n] for n in same], layout)
            fitting |= dict.fromkeys(same, fitted)
            reasons |= {
                n: why_one for n in same if fit_scheme(wanted, [shapes[n]], layout) != fitted
            }
    if fitting != schemes and layout.why_not_together(fitting):
        whole = _one_for_all(schemes, shapes, layout)
        fits = all(s.spec.divides(shapes[n][1]) for n, s in whole.items())
        if fits and layout.why_not_together(whole) is None:
            reason = f"format {layout.name} has one group size for all linears"
            reasons |= {n: reason for n in whole if whole[n] != fitting[n]}
            fitting = whole
    return Fit(fitting, _changes(schemes, fitting, shapes, reasons))


def _one_for_all(
    schemes: Mapping[str, Scheme], shapes: Mapping[str, Shape], layout: Format
) -> dict[str, Scheme]:
    selected = [shapes[n] for n in schemes]
    return {n: fit_scheme(s, selected, layout) for n, s in schemes.items()}


def _sized(scheme: Scheme, size: int | None) -> Scheme:
    return replace(scheme, spec=replace(scheme.spec, group_size=size))


def _changes(
    wanted: Mapping[str, Scheme],
    fitting: Mapping[str, Scheme],
    shapes: Mapping[str, Shape],
    reasons: Mapping[str, str],
) -> tuple[GroupSizeRecord, ...]:
    """One record for all linears of which the same is to be said."""
    found: dict[tuple[int, int, int, str, bool], list[str]] = {}
    for name, scheme in fitting.items():
        before, after = wanted[name].spec.group_size, scheme.spec.group_size
        if before is None or before == after:
            continue
        columns = shapes[name][1]
        reason = reasons[name] or _reason(before, after, columns)
        key = before, -1 if after is None else after, columns, reason, is_embedding(name)
        found.setdefault(key, []).append(numberless(name))
    return tuple(
        GroupSizeRecord(
            linears=tuple(dict.fromkeys(names)),
            count=len(names),
            columns=columns,
            wanted=before,
            used=after,
            reason=reason,
            embeddings=embeddings,
        )
        for (before, after, columns, reason, embeddings), names in found.items()
    )


def _reason(wanted: int, used: int | None, columns: int) -> str:
    smaller = [s for s in SIZES if s < wanted]
    if used is None and smaller:
        return f"none of {', '.join(map(str, (wanted, *smaller)))} divides {columns} columns"
    return f"{wanted} does not divide {columns} columns"
