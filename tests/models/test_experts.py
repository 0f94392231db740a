"""Mixtures of experts: linears of their own compute what transformers' stacked experts do, and none
goes uncalibrated in silence.

The float64 comparisons are of two derivations of the same numbers; ``TWIN_ATOL`` is their bound,
and each planted slip is larger by orders of magnitude.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_kinds import small
from test_supported_models import IDS, checkpoint, recipe
from tiny_models import EXPERTS, STAGES, random_model, save, token_windows
from tolerances import TWIN_ATOL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmquant import inspect, register_with_transformers, unregister_from_transformers
from llmquant.checkpoint.manifest import read_manifest
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion import convert
from llmquant.errors import ArchitectureError, UsageError
from llmquant.formats.engines import VLLM_AVX512
from llmquant.models.architectures import ARCHITECTURES, Stacked, blocks_of, find
from llmquant.models.block_inputs import first_inputs, run_block
from llmquant.models.experts import UNSEEN, Expert, ExpertList, Watch, passes_of, place_of, watched
from llmquant.models.from_folder import empty_model
from llmquant.models.load import load
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.models.reading.fit import fitted
from llmquant.planning.allocation.allocate import allocate
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.preview import make_plan
from llmquant.quantization.blocks.capture import observe, observe_pairs
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.stats import InputStats

MIXTURES = [kind for kind in STAGES if ARCHITECTURES[kind].experts is not None]
UNREAD = ("granitemoe", "gpt_oss")  # which transformers does not load with packed experts
TOKENS = torch.stack(token_windows(3, 12))


INT8 = {"weights.bits": 8, "weights.group_size": -1, "weights.activations": "int8-dynamic"}


def named(kind: str, **changes: object) -> nn.Module:
    model = random_model(kind, **changes)
    as_in_checkpoint(model, kind)
    return model


def experts_of(model: nn.Module) -> list[ExpertList]:
    return [m for m in model.modules() if isinstance(m, ExpertList)]


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param("eager", torch.float64, id="eager"),
        pytest.param("batched_mm", torch.float64, id="batched"),
        pytest.param("grouped_mm", torch.float32, id="grouped, which has no float64"),
    ],
)
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_model_computes_what_transformers_does(
    kind: str, kernel: str, dtype: torch.dtype
) -> None:
    model = random_model(kind).to(dtype)
    if kind != "llama4_text":  # which has one implementation
        model.set_experts_implementation(kernel)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        as_in_checkpoint(model, kind)
        got = model(TOKENS).logits
    assert len(experts_of(model)) == 2
    torch.testing.assert_close(
        got, wanted, **({"rtol": 0, "atol": TWIN_ATOL} if dtype == torch.float64 else {})
    )


def swap_gate_and_up(experts: ExpertList) -> None:
    for expert in experts:
        gate, up, down = expert._names
        expert._names = (up, gate, down)


def next_experts_down(experts: ExpertList) -> None:
    downs = [e.get_submodule(e._names[2]) for e in experts]
    for expert, down in zip(experts, downs[1:] + downs[:1], strict=True):
        expert.add_module(expert._names[2], down)


def another_order(experts: ExpertList) -> None:
    experts._modules = dict(
        zip(experts._modules, reversed(list(experts._modules.values())), strict=True)
    )


@pytest.mark.parametrize(
    "slip", [swap_gate_and_up, next_experts_down, another_order], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_planted_slip_is_caught(kind: str, slip) -> None:
    model = random_model(kind).double()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        wanted = model(TOKENS).logits
        as_in_checkpoint(model, kind)
        slip(experts_of(model)[0])
        assert float((model(TOKENS).logits - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", [*MIXTURES, "gpt_neox"])
def test_names_are_those_that_transformers_saves(kind: str, tmp_path: Path) -> None:
    fit = fitted(CheckpointReader(save(kind, tmp_path)))
    reader, model = fit.reader, empty_model(fit.reader, torch.float32)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {
        n: i.shape for n, i in reader.tensors.items()
    }
    if kind == "gpt_neox":
        assert "embed_out.weight" in reader
    else:
        expert = {
            n for n in reader.tensors if ".0." in n.partition("layers.1.")[2] and "experts" in n
        }
        linears = {n for stage in STAGES[kind] for n in stage if ".experts.0." in n}
        leaves = ("weight", "bias") if kind == "gpt_oss" else ("weight",)
        assert expert == {f"model.layers.1.{n}.{leaf}" for n in linears for leaf in leaves}


def test_a_tied_head_is_tied_by_its_name_in_the_checkpoint() -> None:
    model = named("gpt_neox", tie_word_embeddings=True)
    model.tie_weights()
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == {
        "embed_out.weight": "gpt_neox.embed_in.weight"
    }
    assert model.lm_head is model.embed_out
    assert model.embed_out.weight is model.gpt_neox.embed_in.weight


def test_a_renamed_module_that_is_replaced_is_the_one_that_runs() -> None:
    model = named("gpt_neox")
    model.embed_out = nn.Linear(32, 7)
    assert model(TOKENS).logits.shape[-1] == 7


def test_blocks_without_experts_stay_and_other_stacks_are_refused() -> None:
    model = named("qwen3_moe", mlp_only_layers=[1])
    assert len(experts_of(model)) == 1
    strange = random_model("mixtral")
    strange.model.layers[0].mlp.experts.is_transposed = True
    with pytest.raises(
        ArchitectureError,
        match=r"block_sparse_moe\.experts is not stacked as gate_up_proj and down_proj",
    ):
        as_in_checkpoint(strange, "mixtral")


def toy(chosen: list[list[int]], everything: bool) -> tuple[Tensor, list[int], Watch]:
    """A list of three experts, of which the last gets no token: its output, the rows each linear
    was called with, the watch."""
    torch.manual_seed(0)
    stacked = nn.Module()
    stacked.act_fn = nn.SiLU()
    stacked.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
    stacked.down_proj = nn.Parameter(torch.randn(3, 6, 4))
    experts = ExpertList(stacked, ("w1", "w3", "w2"), Stacked("gate_up_proj", "down_proj"))
    rows: list[int] = []
    for expert in experts:
        assert isinstance(expert, Expert)
        expert.w1.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    hidden, index = torch.randn(4, 6), torch.tensor(chosen)
    watch = Watch(everything)
    with watched(experts, watch):
        out = experts(hidden, index, torch.full(index.shape, 0.5))
    assert experts.watch is None
    assert torch.equal(experts(hidden, index, torch.full(index.shape, 0.5)), out)
    return out, rows, watch


ROUTES = [[0, 1], [1, 0], [0, 1], [1, 0]]


def test_watched_experts_are_all_called() -> None:
    _, rows, watch = toy(ROUTES, everything=False)
    assert rows == [4, 4, 0, 4, 4]  # watched, then unwatched: the last has no tokens
    assert watch.routes[0][0].tolist() == ROUTES


def test_experts_shown_everything_change_no_output() -> None:
    out, rows, _ = toy(ROUTES, everything=True)
    assert rows == [4, 4, 4, 4, 4]
    assert torch.equal(out, toy(ROUTES, everything=False)[0])


@pytest.mark.parametrize("everything", [False, True], ids=["routed", "all"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_statistics_are_those_of_the_tokens_that_the_router_sends(
    kind: str, everything: bool
) -> None:
    model = named(kind)
    blocks = blocks_of(model, find(model, kind))
    inputs = first_inputs(model, blocks, [TOKENS, TOKENS[:, 3:9]])
    inside = blocks[0].get_submodule(ARCHITECTURES[kind].experts.inside)
    names = ARCHITECTURES[kind].experts.linears()[0].replace("*", "{}")
    wanted = {names.format(i): blocks[0].get_submodule(names.format(i)) for i in range(EXPERTS)}
    expected = {name: InputStats(32) for name in wanted}

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, weights = args
        for i, stats in enumerate(expected.values()):
            sent = (chosen == i).any(dim=1)
            shown = hidden.clone()
            if ARCHITECTURES[kind].experts.weighs_inputs:
                shown[sent] *= weights[chosen == i].unsqueeze(-1)
            stats.add(shown if everything else shown[sent])

    handle = inside.experts.register_forward_pre_hook(note)
    for batch in inputs:
        run_block(blocks[0], batch)
    handle.remove()
    observed = observe(blocks[0], wanted, inputs, everything)
    assert {n: s.tokens for n, s in observed.items()} == {n: s.tokens for n, s in expected.items()}
    assert sum(s.tokens for s in observed.values()) == 54 * (EXPERTS if everything else 2)
    for name, stats in observed.items():
        torch.testing.assert_close(stats.hessian, expected[name].hessian)


@pytest.mark.parametrize("everything", [False, True], ids=["routed", "all"])
def test_pairs_are_of_the_same_tokens_though_the_original_routes_others(everything: bool) -> None:
    model = named("mixtral")
    blocks = blocks_of(model, find(model, "mixtral"))
    (inputs,) = first_inputs(model, blocks, [TOKENS])
    names = [f"block_sparse_moe.experts.{i}.w1" for i in range(EXPERTS)]
    wanted = {n: blocks[0].get_submodule(n) for n in names}
    original = inputs.hidden + 0.5 * torch.randn(
        inputs.hidden.shape, generator=torch.Generator().manual_seed(2)
    )
    routes = [Watch(), Watch()]
    for watch, hidden in zip(routes, (inputs.hidden, original), strict=True):
        with watched(blocks[0], watch):
            run_block(blocks[0], type(inputs)(hidden, inputs.calls))
    assert not torch.equal(routes[0].routes[0][0], routes[1].routes[0][0]), (
        "the streams must part for this test to tell"
    )
    pairs = observe_pairs(blocks[0], wanted, [inputs], {}, [original], everything)
    plain = observe(blocks[0], wanted, [inputs], everything)
    for name, pair in pairs.items():
        assert pair.tokens == plain[name].tokens
        assert torch.equal(pair.hessian, plain[name].hessian)


def test_experts_are_observed_together_as_far_as_memory_goes() -> None:
    block = blocks_of(model := named("mixtral"), find(model, "mixtral"))[0]
    sets = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
    experts = [f"block_sparse_moe.experts.{i}" for i in range(EXPERTS)]
    gates, downs = [(f"{e}.w1", f"{e}.w3") for e in experts], [(f"{e}.w2",) for e in experts]
    sets += [s for pair in zip(gates, downs, strict=True) for s in pair]
    assert passes_of(block, sets, limit=10**9) == [[sets[0]], [sets[1]], gates, downs]
    assert passes_of(block, sets, limit=48 * 48 * 2) == [
        [sets[0]],
        [sets[1]],
        gates[:2],
        downs[:2],
        gates[2:],
        downs[2:],
    ]
    assert passes_of(block, sets, limit=1) == [[s] for s in sets]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("block_sparse_moe.experts.2.w3", (2, "w3")),
        ("self_attn.q_proj", None),
        ("block_sparse_moe.gate", None),
    ],
    ids=["expert", "attention", "router"],
)
def test_the_place_of_a_linear(name: str, place: tuple[int, str] | None) -> None:
    found = place_of(named("mixtral").model.layers[0], name)
    assert (found and (found.expert, found.linear)) == place


def starving(folder: Path) -> Path:
    """A Mixtral whose routers send every token to expert 1 or 2, never to 0 or 3."""
    path = checkpoint("mixtral", folder, num_experts_per_tok=1)
    model = random_model("mixtral", vocab_size=4096, num_experts_per_tok=1, bos_token_id=0)
    for layer in model.model.layers:
        direction = torch.randn(32, generator=torch.Generator().manual_seed(5))
        layer.mlp.gate.weight.copy_(
            torch.stack([direction, 2 * direction, -direction, 0.5 * direction])
        )
    model.save_pretrained(path)
    return path


STARVED = {
    f"model.layers.{b}.block_sparse_moe.experts.{e}.{w}"
    for b in (0, 1)
    for e in (0, 3)
    for w in ("w1", "w2", "w3")
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="gptq"),
        pytest.param({"gptq.true_sequential": False}, id="gptq in one pass"),
        pytest.param({"gptq.asymmetric": 0.5, "gptq.passes": 1}, id="gptq refined"),
        pytest.param({"method": "rtn", "awq": {}}, id="awq"),
        pytest.param({"smooth": {"pairs": "all"}, "format": "int-quantized", **INT8}, id="smooth"),
        pytest.param({"tune": {"steps": 2}}, id="tune"),
    ],
)
def test_an_expert_without_tokens_is_rounded_to_nearest_and_reported(
    changes: dict[str, object], tmp_path: Path
) -> None:
    source, out = starving(tmp_path / "source"), tmp_path / "out"
    result = quantize(source, out, recipe("gptq").updated(changes))
    assert {m.name for m in result.modules if m.fallback} == STARVED
    assert all(
        m.fallback == UNSEEN and m.tokens == 0 and m.output_error is None
        for m in result.modules
        if m.name in STARVED
    )
    assert {n for n, m in read_manifest(out).modules.items() if m.fallback == UNSEEN} == STARVED
    (told,) = (w for w in result.warnings if UNSEEN in w)
    assert "experts.0.w1" in told
    assert "and 9 more" in told
    assert "--all-experts" in told
    (seen,) = inspect(out).fallbacks
    assert UNSEEN in seen
    if changes.keys().isdisjoint(("tune", "awq", "smooth")):
        plain = quantize(source, tmp_path / "rtn", recipe("rtn"))
        digests = {m.name: m.digest for m in plain.modules}
        assert all((m.digest == digests[m.name]) == (m.name in STARVED) for m in result.modules)
    if not changes.keys().isdisjoint(("awq", "smooth")):
        reasons = {p.readers[0]: p.reason for pairs in result.scaled.values() for p in pairs}
        assert {n for n, why in reasons.items() if why == UNSEEN} == {
            n for n in STARVED if n.endswith("w2")
        }
        assert (
            reasons["model.layers.0.block_sparse_moe.experts.0.w1"]
            == "the router reads these channels too"
        )
        assert reasons["model.layers.0.block_sparse_moe.experts.1.w2"] != UNSEEN


@pytest.mark.parametrize("changes", [{}, {"gptq.asymmetric": 0.5}], ids=["plain", "asymmetric"])
def test_shown_every_token_no_expert_falls_back(changes: dict[str, object], tmp_path: Path) -> None:
    wanted = recipe("gptq").updated({"calibration.all_experts": True, **changes})
    result = quantize(starving(tmp_path / "source"), tmp_path / "out", wanted)
    assert {m.tokens for m in result.modules} == {4 * 32}
    assert not any(m.fallback for m in result.modules)
    assert result.warnings == ()


@pytest.mark.parametrize("sensitivity", ["kl", "block"])
def test_an_allocation_takes_a_blocks_experts_together(sensitivity: str, tmp_path: Path) -> None:
    source = starving(tmp_path / "source")
    few = AllocateOptions(
        7, widths=(4, 8), group_sizes=(16,), symmetric=True, sensitivity=sensitivity
    )
    found = allocate(source, recipe("gptq"), few)
    sizes = [len(item.names) for item in found.items]
    assert sizes == [3, 1, 3 * EXPERTS] * 2
    assert found.predicted >= 0
    assert quantize(source, tmp_path / "out", found.recipe).bits_per_weight <= 7


def test_a_conversion_keeps_experts_and_routers(tmp_path: Path) -> None:
    packed = quantize(
        checkpoint("mixtral", tmp_path / "source"), tmp_path / "a", recipe("rtn")
    ).path
    convert(packed, "gptq", tmp_path / "b")
    convert(tmp_path / "b", "compressed-tensors", tmp_path / "c")
    convert(packed, "dense", tmp_path / "d")
    assert read_manifest(tmp_path / "c").skipped == read_manifest(packed).skipped
    reference = load(packed, dtype="float32", kernel="reference")
    dense = empty_model(CheckpointReader(tmp_path / "d"), torch.float32)
    with torch.no_grad():
        for folder in ("b", "c"):
            assert torch.equal(
                load(tmp_path / folder, dtype="float32", kernel="reference")(IDS).logits,
                reference(IDS).logits,
            )
    assert {n for n, _ in dense.named_parameters()} == set(CheckpointReader(tmp_path / "d").tensors)


def test_stacked_experts_are_not_made_dense_again(tmp_path: Path) -> None:
    packed = quantize(
        checkpoint("granitemoe", tmp_path / "source"), tmp_path / "a", recipe("rtn")
    ).path
    convert(packed, "gptq", tmp_path / "b")
    with pytest.raises(UsageError, match="stack their experts in one tensor, which convert does"):
        convert(packed, "dense", tmp_path / "c")


def test_a_type_that_stacks_experts_may_have_none(tmp_path: Path) -> None:
    """Granite 4's dense models are of a mixture's type."""
    config = small("granitemoehybrid", num_local_experts=0, num_experts_per_tok=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    assert make_plan(tmp_path / "source", recipe("rtn")).engines["transformers"] == ()
    packed = quantize(tmp_path / "source", tmp_path / "packed", recipe("rtn")).path
    assert inspect(packed).engines["transformers"] == ()
    convert(packed, "dense", tmp_path / "dense")
    ours = load(packed, dtype="float32", kernel="reference")(IDS).logits
    for folder in (packed, tmp_path / "dense"):
        theirs, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(told.values())
        torch.testing.assert_close(theirs(IDS).logits, ours)


@pytest.mark.parametrize("only", [(), ("*experts*",)], ids=["packed", "plain"])
def test_stacked_experts_are_not_read_by_transformers(
    only: tuple[str, ...], tmp_path: Path
) -> None:
    source = checkpoint("granitemoe", tmp_path / "source")
    changes = {"ignore": ("lm_head", *only)}
    (first, *_) = make_plan(source, recipe("rtn").updated(changes)).engines["transformers"]
    assert "only stacked and unquantized" in first


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("mixtral", {}),
        ("mixtral", {"format": "int-quantized", **INT8}),
        ("phimoe", {}),
        ("deepseek_v3", {}),
        ("llama4_text", {}),
    ],
)
def test_whether_transformers_takes_experts_that_are_left_alone(
    kind: str, spec: dict[str, object], tmp_path: Path
) -> None:
    """Attention alone is quantized: said beforehand, and so it is."""
    source = checkpoint(kind, tmp_path / "source")
    wanted = recipe("rtn").updated({"include": ["*self_attn*"], **spec})
    planned = make_plan(source, wanted).engines["transformers"]
    packed = quantize(source, tmp_path / "out", wanted).path
    assert inspect(packed).engines["transformers"] == planned
    again = convert(packed, wanted.format, tmp_path / "again")
    assert [w for w in again.warnings if w.startswith("transformers")] == [
        f"transformers will not take it: {reason}" for reason in planned
    ]
    if kind == "llama4_text":
        assert planned == ()
        return
    assert "fails at a mixture with experts that are not quantized" in planned[0]
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_recipe_that_says_nothing_of_experts_keeps_its_hash() -> None:
    off = Recipe.model_validate({"calibration": {"all_experts": False}})
    assert (
        off.sha256()
        == Recipe().sha256()
        != Recipe.model_validate({"calibration": {"all_experts": True}}).sha256()
    )


def test_a_gpt_neox_as_it_was_published(tmp_path: Path) -> None:
    """With the masks and tables that its checkpoints carry along, as Pythia's do."""
    source = checkpoint("gpt_neox", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for layer in ("gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"):
        tensors[f"{layer}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{layer}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
    plain = quantize(source, tmp_path / "plain", recipe("gptq")).path
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    packed = quantize(source, tmp_path / "out", recipe("gptq")).path
    assert {n: m.digest for n, m in read_manifest(packed).modules.items()} == {
        n: m.digest for n, m in read_manifest(plain).modules.items()
    }
    with torch.no_grad():
        assert torch.equal(load(packed)(IDS).logits, load(plain)(IDS).logits)


@pytest.mark.parametrize("kind", [*MIXTURES, "gpt_neox"])
def test_from_pretrained_gives_what_load_gives(kind: str, tmp_path: Path) -> None:
    include = {} if kind == "gpt_neox" else {"include": ("*experts.*.*",)}
    packed = quantize(
        checkpoint(kind, tmp_path / "source"), tmp_path / "out", recipe("rtn").updated(include)
    ).path
    register_with_transformers()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    finally:
        unregister_from_transformers()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, load(packed, dtype=torch.bfloat16)(IDS).logits)


@pytest.mark.parametrize("kind", [*(k for k in MIXTURES if k not in UNREAD), "gpt_neox"])
def test_transformers_own_loader_computes_the_same(kind: str, tmp_path: Path) -> None:
    packed = quantize(checkpoint(kind, tmp_path / "source"), tmp_path / "out", recipe("rtn")).path
    assert inspect(packed).engines["transformers"] == ()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)(IDS).logits
        ours, original = (
            load(f, dtype="float32", kernel="dense")(IDS).logits
            for f in (packed, tmp_path / "source")
        )
    # Its packed scales are float32 here as ours are, so only the order of sums is left; what
    # quantization changed is far larger.
    assert float((theirs - ours).abs().max()) < 1e-3 * float((ours - original).abs().max())


@pytest.mark.parametrize(
    ("layout", "spec", "engine", "words", "of_attention"),
    [
        pytest.param(
            "compressed-tensors",
            {},
            VLLM_AVX512,
            "no kernel for experts of 4 bits",
            None,
            id="vllm, compressed-tensors",
        ),
        pytest.param(
            "gptq",
            {"weights.group_size": 16},
            VLLM_AVX512,
            "no groups of 16",
            "no groups of 16",
            id="vllm, gptq as ever",
        ),
        pytest.param(
            "int-quantized",
            INT8,
            "transformers",
            "stored as int8",
            "experts that are not quantized",
            id="transformers, int8",
        ),
    ],
)
def test_what_engines_refuse_of_experts(
    layout: str, spec: dict[str, object], engine: str, words: str, of_attention: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = save("mixtral", tmp_path / "source")
    everything = Recipe(method="rtn", format=layout).updated({"weights.group_size": 16, **spec})
    (reason,) = make_plan(source, everything).engines[engine]
    assert words in reason
    attention = make_plan(source, everything.updated({"include": ("*.self_attn.*",)}))
    refused = attention.engines[engine]
    assert len(refused) == (of_attention is not None)
    assert all((of_attention or "") in reason for reason in refused)


def test_a_quantized_head_of_another_name(tmp_path: Path) -> None:
    wanted = recipe("gptq").updated({"ignore": ()})
    result = quantize(checkpoint("gpt_neox", tmp_path / "source"), tmp_path / "out", wanted)
    assert "embed_out" in {m.name for m in result.modules}
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    assert groups["group_0"]["targets"] == ["Linear", "embed_out"]
    assert load(tmp_path / "out")(IDS).logits.shape[-1] == 4096


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"overrides": ({"match": "w2", "bits": 8},)}, id="down of more bits"),
        pytest.param({"ignore": ("lm_head", "*.experts.3.*")}, id="an expert left alone"),
    ],
)
def test_experts_of_a_block_share_one_scheme(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"engines fuse these linears.*experts.0.w1: W4 g16 sym, .*experts\.[03]\.w[123]:",
    ):
        quantize(
            checkpoint("mixtral", tmp_path / "source"),
            tmp_path / "out",
            recipe("rtn").updated(changes),
        )


def test_routers_may_be_ignored_and_not_included(tmp_path: Path) -> None:
    source = checkpoint("mixtral", tmp_path / "source")
    result = quantize(
        source, tmp_path / "out", recipe("rtn").updated({"ignore": ("lm_head", "*.gate")})
    )
    assert result.skipped["model.layers.0.block_sparse_moe.gate"] == "router of experts"
    with pytest.raises(UsageError, match=r"pattern '\*\.gate' matches none"):
        quantize(source, tmp_path / "none", recipe("rtn").updated({"include": ("*.gate",)}))


def test_an_expert_beyond_the_configs_number_is_named_with_the_reason(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last = f"model.layers.0.mlp.experts.{EXPERTS}.gate_proj"
    tensors[f"{last}.weight"] = torch.zeros(16, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.model_validate({"method": "rtn", "weights": {"group_size": 16}})
    told = rf"{last}: unquantized \(no place in the model of config\.json\)"
    with pytest.raises(UsageError, match=told):
        make_plan(tmp_path, recipe)
