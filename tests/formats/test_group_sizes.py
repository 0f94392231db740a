"""Which group size a linear gets where the wanted one does not divide its columns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmquant.formats import FORMATS, Scheme
from llmquant.formats.group_sizes import fit_scheme, fit_schemes
from llmquant.spec import QuantSpec

CT = FORMATS["compressed-tensors"]
ROW = None


def scheme(size: int | None, bits: int = 4, *, g_idx: bool = False) -> Scheme:
    return Scheme(QuantSpec(bits, size), g_idx=g_idx)


@pytest.mark.parametrize(
    ("wanted", "columns", "used"),
    [
        pytest.param(128, [512], 128, id="divides"),
        pytest.param(128, [576], 64, id="SmolLM2's hidden size"),
        pytest.param(128, [96], 32, id="neither 64 nor 96, which engines do not take"),
        pytest.param(64, [96], 32, id="64 wanted"),
        pytest.param(256, [576], 64, id="256 wanted"),
        pytest.param(1024, [1536], 128, id="not 512, which engines do not take"),
        pytest.param(96, [576], 96, id="an odd size that divides is meant"),
        pytest.param(48, [64], 32, id="an odd size that does not divide"),
        pytest.param(128, [1200], ROW, id="16 would divide, and is below the floor"),
        pytest.param(128, [172], ROW, id="nothing divides"),
        pytest.param(16, [40], ROW, id="nothing below the floor is tried"),
        pytest.param(32, [64, 96], 32, id="two widths"),
        pytest.param(128, [128, 192], 64, id="two widths, one of which would take more"),
        pytest.param(128, [64, 40], ROW, id="two widths without a common size"),
        pytest.param(ROW, [576], ROW, id="one scale per row"),
    ],
)
def test_the_largest_that_divides_and_that_engines_take(
    wanted: int | None, columns: Sequence[int], used: int | None
) -> None:
    fitted = fit_scheme(scheme(wanted), [(64, c) for c in columns], CT)
    assert fitted == scheme(used)


def test_what_a_layout_cannot_hold_is_no_choice() -> None:
    """A stored order of columns needs groups, so one scale per row is refused, and the wanted size
    stays to be named in the error."""
    assert fit_scheme(scheme(128, g_idx=True), [(64, 172)], CT) == scheme(128, g_idx=True)
    assert fit_scheme(scheme(128, g_idx=True), [(64, 192)], CT) == scheme(64, g_idx=True)


SHAPES = {"0.q": (64, 192), "0.down": (64, 256), "0.odd": (64, 40), "0.short": (60, 192)}
APART = [(n,) for n in SHAPES]


def fitted(
    layout: str, names: Sequence[str], together: Sequence[Sequence[str]]
) -> list[int | None]:
    wanted = {n: scheme(128) for n in names}
    fit = fit_schemes(wanted, together, SHAPES, FORMATS[layout])
    return [fit.schemes[n].spec.group_size for n in names]


@pytest.mark.parametrize(
    ("layout", "names", "together", "sizes"),
    [
        pytest.param("compressed-tensors", [*SHAPES], APART, [64, 128, ROW, 64], id="each its own"),
        pytest.param("gptq", ["0.q", "0.down"], APART, [64, 128], id="gptq has exceptions"),
        pytest.param("awq", ["0.q", "0.down"], APART, [64, 64], id="awq has one for all"),
        pytest.param("awq", ["0.down"], APART[1:2], [128], id="awq where it divides"),
        pytest.param(
            "compressed-tensors", ["0.q", "0.down"], [("0.q", "0.down")], [64, 64], id="fused"
        ),
    ],
)
def test_linears_of_a_model(
    layout: str, names: list[str], together: list[tuple[str, ...]], sizes: list[int | None]
) -> None:
    assert fitted(layout, names, [t for t in together if set(t) <= set(names)]) == sizes


@pytest.mark.parametrize(
    ("layout", "together", "said"),
    [
        pytest.param(
            "compressed-tensors",
            [("0.q",), ("0.down",)],
            ["groups of 64 instead of 128 for 1 linear (q): 128 does not divide 192 columns"],
            id="does not divide",
        ),
        pytest.param(
            "awq",
            [("0.q",), ("0.down",)],
            [
                "groups of 64 instead of 128 for 1 linear (q): 128 does not divide 192 columns",
                "groups of 64 instead of 128 for 1 linear (down): format awq has one group size for all linears",
            ],
            id="one for all",
        ),
        pytest.param(
            "compressed-tensors",
            [("0.q", "0.down")],
            [
                "groups of 64 instead of 128 for 1 linear (q): 128 does not divide 192 columns",
                "groups of 64 instead of 128 for 1 linear (down): engines fuse them with linears of other widths",
            ],
            id="fused",
        ),
        pytest.param(
            "compressed-tensors",
            [("0.odd",)],
            [
                "one scale per row instead of 128 for 1 linear (odd): none of 128, 64, 32 divides 40 columns"
            ],
            id="per row",
        ),
        pytest.param(
            "awq",
            [("0.q",), ("0.short",)],
            ["groups of 64 instead of 128 for 1 linear (q): 128 does not divide 192 columns"],
            id="one for all, of which the layout can hold one only",
        ),
    ],
)
def test_every_change_says_why(
    layout: str, together: list[tuple[str, ...]], said: list[str]
) -> None:
    wanted = {n: scheme(128) for names in together for n in names}
    fit = fit_schemes(wanted, together, SHAPES, FORMATS[layout])
    assert [str(change) for change in fit.changes] == said
