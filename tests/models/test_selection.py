"""Selection: every linear gets a scheme or a reason, and what cannot work is refused before work
starts."""

from __future__ import annotations

from typing import Any

import pytest

from llmquant.errors import ArchitectureError, FormatError, LayoutError, SpecError, UsageError
from llmquant.formats import FORMATS
from llmquant.models.architectures import ARCHITECTURES, Architecture
from llmquant.models.reading.linears import Linears
from llmquant.models.selection import Selection, select
from llmquant.recipe import Recipe

LLAMA = ARCHITECTURES["llama"]
LEAVES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def linears(*, tied: bool = False, more: dict[str, tuple[int, int]] | None = None) -> Linears:
    """Two Llama blocks and a head."""
    shapes = {f"model.layers.{i}.{leaf}": shape for i in range(2) for leaf, shape in LEAVES.items()}
    return Linears({**shapes, "lm_head": (128, 64), **(more or {})}, "lm_head", tied)


# Of widths that fill neither AWQ's rows of 8 nor GPTQ's words.
NARROW_LEAVES = {
    "self_attn.q_proj": (96, 172),
    "self_attn.k_proj": (48, 172),
    "self_attn.v_proj": (48, 172),
    "self_attn.o_proj": (172, 96),
    "mlp.gate_proj": (100, 172),
    "mlp.up_proj": (100, 172),
    "mlp.down_proj": (172, 100),
}
NARROW = Linears(
    {f"model.layers.0.{leaf}": shape for leaf, shape in NARROW_LEAVES.items()}, None, tied=True
)


def chosen(
    layout: str = "compressed-tensors",
    architecture: Architecture = LLAMA,
    of: Linears | None = None,
    **recipe: Any,
) -> Selection:
    weights = {"group_size": 32, **recipe.pop("weights", {})}
    made = Recipe.model_validate({"method": "rtn", "weights": weights, **recipe})
    return select(of or linears(), architecture, made, FORMATS[layout])


def test_by_default_everything_but_the_head() -> None:
    selection = chosen()
    assert set(selection.schemes) == {n for n in linears().shapes if n != "lm_head"}
    assert selection.skipped == {"lm_head": "ignore pattern lm_head"}
    assert selection.head is None


@pytest.mark.parametrize(
    ("recipe", "count", "head"),
    [
        ({"include": ["*.mlp.*"]}, 6, None),
        ({"include": ["down_proj"]}, 2, None),
        ({"ignore": ["lm_head", "model.layers.0.*"]}, 7, None),
        ({"ignore": []}, 15, "lm_head"),
        ({"include": ["lm_head"], "ignore": []}, 1, "lm_head"),
    ],
    ids=["include", "a tail", "ignore", "the head too", "the head alone"],
)
def test_patterns_choose(recipe: dict[str, Any], count: int, head: str | None) -> None:
    selection = chosen(**recipe)
    assert (len(selection.schemes), selection.head) == (count, head)
    assert selection.schemes.keys() | selection.skipped.keys() == linears().shapes.keys()
    assert not selection.schemes.keys() & selection.skipped.keys()


def test_a_linear_that_no_pattern_includes_says_so() -> None:
    assert chosen(include=["*.mlp.*", "o_proj"]).skipped["model.layers.0.self_attn.q_proj"] == (
        "no include pattern of *.mlp.*, o_proj matches"
    )


REFUSED = [
    pytest.param(
        {"include": ["nope"]},
        UsageError,
        "pattern 'nope' matches none of the model's 15 linears",
        id="include",
    ),
    pytest.param({"ignore": ["nope"]}, UsageError, "pattern 'nope' matches none", id="ignore"),
    pytest.param(
        {"overrides": [{"match": "nope", "bits": 8}]},
        UsageError,
        "pattern 'nope' matches none",
        id="override",
    ),
    pytest.param(
        {"ignore": ["*"]}, UsageError, "selects none of the model's 15 linears", id="nothing left"
    ),
    pytest.param(
        {"weights": {"group_size": 64}},
        SpecError,
        r"model\.layers\.0\.mlp\.down_proj: group_size=64 does not divide its 96 input columns; sizes that do: "
        r"8, 16, 32, or -1 .*--ignore model\.layers\.0\.mlp\.down_proj",
        id="a size that does not divide",
    ),
    pytest.param(
        {"overrides": [{"match": "q_proj", "bits": 8}]},
        UsageError,
        "engines fuse these linears, so they need one scheme.*q_proj: W8 g32 sym.*k_proj: W4 g32 sym",
        id="fused apart",
    ),
    pytest.param(
        {"ignore": ["k_proj"]},
        UsageError,
        r"engines fuse these linears.*k_proj: unquantized \(ignore pattern k_proj\)",
        id="fused half",
    ),
    pytest.param(
        {"layout": "awq", "weights": {"bits": 3}},
        FormatError,
        "format awq cannot hold W3 g32 sym",
        id="layout: bits",
    ),
    pytest.param(
        {"of": NARROW, "layout": "gptq"},
        LayoutError,
        "^model.layers.0.self_attn.q_proj: format gptq cannot hold this linear in any group size: the input size 172 at "
        "4 bits does not fill whole 32-bit words; use --format compressed-tensors$",
        id="layout: no linear",
    ),
    pytest.param(
        {"of": NARROW, "layout": "awq", "weights": {"group_size": 128}},
        LayoutError,
        "^model.layers.0.self_attn.o_proj: format awq cannot hold this linear in any group size: the output size 172 is "
        r"not a multiple of 8; use --format compressed-tensors or leave out what it cannot hold \(--ignore o_proj "
        r"--ignore gate_proj --ignore up_proj --ignore down_proj\)$",
        id="layout: some linears",
    ),
    pytest.param(
        {"of": NARROW, "method": "gptq", "gptq": {"act_order": "group"}},
        SpecError,
        r"sizes that do: none of 8 or more, or -1 for one group per row \(with act-order static\)\.",
        id="a row has no order of groups",
    ),
    pytest.param(
        {"layout": "awq", "overrides": [{"match": "*.mlp.*", "group_size": 16}]},
        FormatError,
        "format awq cannot hold this recipe's mix",
        id="layout: mix",
    ),
    pytest.param(
        {"of": linears(tied=True), "ignore": []},
        UsageError,
        "lm_head shares its weights with the embeddings",
        id="tied head",
    ),
    pytest.param(
        {"of": linears(more={"model.vision.proj": (64, 64)})},
        ArchitectureError,
        r"model\.vision\.proj is neither in a decoder block nor the head; add it to --ignore",
        id="outside the blocks",
    ),
]


@pytest.mark.parametrize(("request_", "error", "words"), REFUSED)
def test_what_cannot_work_is_refused(
    request_: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        chosen(**request_)


def test_the_default_ignore_need_not_match() -> None:
    """Many models have no linear of the name lm_head."""
    headless = Linears(
        {n: s for n, s in linears().shapes.items() if n != "lm_head"}, None, tied=True
    )
    assert len(chosen(of=headless).schemes) == 14


def test_overrides_make_schemes() -> None:
    selection = chosen(overrides=[{"match": "*.self_attn.*", "bits": 8, "group_size": -1}])
    told = {str(s) for n, s in selection.schemes.items() if ".self_attn." in n}
    assert told == {"W8 row sym"}
    assert {str(s) for n, s in selection.schemes.items() if ".mlp." in n} == {"W4 g32 sym"}


@pytest.mark.parametrize(
    ("method", "order", "stored"),
    [("gptq", "group", True), ("gptq", "static", False), ("rtn", "group", False)],
)
def test_a_group_index_is_announced_where_one_is_made(
    method: str, order: str, stored: bool
) -> None:
    selection = chosen(method=method, gptq={"act_order": order})
    assert {s.g_idx for s in selection.schemes.values()} == {stored}
