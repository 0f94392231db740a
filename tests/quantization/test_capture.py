"""Capture against hooks in a fully loaded model: the same tensors go into every block and every
linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import STAGES, random_model, token_windows
from torch import Tensor, nn

from llmquant.errors import ArchitectureError
from llmquant.models.architectures import blocks_of, find
from llmquant.models.block_inputs import BlockInput, first_inputs, run_block
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.models.reading.linears import linears_of as find_linears
from llmquant.quantization.blocks.capture import observe, stages
from llmquant.stats import InputStats

BATCHES = [torch.stack(token_windows(3, 12)), torch.stack(token_windows(2, 9, seed=1))]
KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2 mixed windows",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "falcon",
]


def blocks_in(model: nn.Module) -> nn.ModuleList:
    as_in_checkpoint(model, model.config.model_type)
    return blocks_of(model, find(model, model.config.model_type))


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def hooked_calls(
    model: nn.Module, ids: Tensor
) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """How the whole model calls its blocks on one batch: hidden states, other positional and
    keyword arguments."""
    calls = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        calls.append((hidden, tuple(rest), kwargs))

    handles = [
        block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_in(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def equal(a: Any, b: Any) -> bool:
    """Deep equality with ``torch.equal`` for tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a, b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_called_as_in_the_whole_model(kind):
    model = random_model(kind)
    blocks = blocks_in(model)
    for ids, inputs in zip(BATCHES, first_inputs(model, blocks, BATCHES), strict=True):
        for block, (hidden, args, kwargs) in zip(blocks, hooked_calls(model, ids), strict=True):
            assert torch.equal(inputs.hidden, hidden)
            assert equal(inputs.calls[0], (args, kwargs))
            inputs = inputs.after(run_block(block, inputs))
        assert inputs.calls == ()


def test_blocks_of_different_attention_get_different_masks():
    model = random_model("qwen2 mixed windows")
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    (inputs,) = first_inputs(model, blocks_in(model), BATCHES[:1])
    first, second = (kwargs["attention_mask"] for _, kwargs in inputs.calls)
    assert not equal(first, second)


def test_blocks_of_equal_attention_share_one_mask():
    model = random_model("mistral", sliding_window=4, num_hidden_layers=3)
    (inputs,) = first_inputs(model, blocks_in(model), BATCHES[:1])
    assert len({id(kwargs["attention_mask"]) for _, kwargs in inputs.calls}) == 1
    assert inputs.calls[0][1]["attention_mask"] is not None


@pytest.mark.parametrize("kind", STAGES)
def test_stages_are_the_linears_that_share_an_input_in_calling_order(kind):
    model = random_model(kind)
    blocks = blocks_in(model)
    (inputs,) = first_inputs(model, blocks, BATCHES[:1])
    routers = {n.rpartition("layers.0.")[2] for n in find_linears(model).routers}
    some = {n: m for n, m in linears_of(blocks[0]).items() if n not in routers}
    assert stages(blocks[0], some, inputs) == STAGES[kind]


def test_stages_of_some_linears_are_of_those_only():
    model = random_model("llama")
    block = blocks_in(model)[0]
    (inputs,) = first_inputs(model, blocks_in(model), BATCHES[:1])
    some = {
        name: m
        for name, m in linears_of(block).items()
        if name.endswith(("down_proj", "v_proj", "q_proj"))
    }
    assert stages(block, some, inputs) == [
        ("self_attn.q_proj", "self_attn.v_proj"),
        ("mlp.down_proj",),
    ]


def test_observed_statistics_are_those_of_the_whole_model():
    model = random_model("qwen3")
    blocks = blocks_in(model)
    linears = linears_of(blocks[0])
    wanted = {
        name: linears[name]
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    observed = observe(blocks[0], wanted, first_inputs(model, blocks, BATCHES))
    expected = {name: InputStats(linear.in_features) for name, linear in wanted.items()}
    handles = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: expected[name].add(args[0]))
        for name, linear in wanted.items()
    ]
    with torch.no_grad():
        for ids in BATCHES:
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, stats in observed.items():
        assert stats.tokens == 3 * 12 + 2 * 9
        assert torch.equal(stats.hessian, expected[name].hessian), name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "self_attn.q_proj"),
        ("opt", "fc1"),  # reads [tokens, hidden]
        ("deepseek_v3", "self_attn.kv_b_proj"),  # reads [windows, 1, positions, rank]
        ("llama4_text", "feed_forward.shared_expert.up_proj"),  # reads [tokens, hidden]
        ("mixtral", "block_sparse_moe.experts.0.w1"),  # reads the tokens sent to it
    ],
)
def test_first_positions_are_known_whatever_shape_a_block_gives_its_inputs(kind, name):
    model = random_model(kind)
    blocks = blocks_in(model)
    inputs = first_inputs(model, blocks, BATCHES)
    linear = linears_of(block := blocks[0])[name]
    (got,), (plain,) = (
        observe(block, {name: linear}, inputs, first_token_share=share).values()
        for share in (0.5, 0.0)
    )
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for batch in inputs:
            run_block(block, batch)
        handle.remove()
    first = torch.zeros_like(plain.hessian)
    for x, batch in zip(seen, inputs, strict=True):
        windows, positions = batch.hidden.shape[:2]
        if x.numel() == windows * positions * x.shape[-1]:
            rows = x.reshape(windows, positions, -1)[:, 0]
            first += (0.5 * positions - 1) * rows.T @ rows
    assert bool(first.any()) == ("experts.0" not in name)
    torch.testing.assert_close(got.hessian, plain.hessian + first)


def test_a_pass_ends_at_the_last_wanted_linear_and_leaves_no_hook():
    model = random_model("llama")
    blocks = blocks_in(model)
    inputs = first_inputs(model, blocks, BATCHES)
    linears = linears_of(blocks[0])
    ran: list[str] = []
    for name, linear in linears.items():
        linear.register_forward_hook(lambda *_a, name=name: ran.append(name))
    observe(blocks[0], {"self_attn.o_proj": linears["self_attn.o_proj"]}, inputs)
    assert ran == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] * len(BATCHES)
    assert not any(linear._forward_pre_hooks for linear in linears.values())


class Toy(nn.Module):
    """An embedding and blocks, put together by ``between``: what happens around each call of a
    block."""

    def __init__(self, blocks: int = 2, how: str = "plain") -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(ToyBlock(how) for _ in range(blocks))
        self.how = how

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            if self.how == "skips" and i:
                break
            if self.how == "scales":
                hidden = hidden * 2
            hidden = layer(hidden_states=hidden, scale=layer.scale)
            if self.how == "tuple":
                hidden = hidden[0]
        return hidden


class ToyBlock(nn.Module):
    """Three linears, called the way ``how`` says; an attribute that the model reads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.scale = 3.0
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states: Tensor, scale: float) -> Any:
        out = self.second(self.first(hidden_states)) * scale
        if self.how == "twice":
            out = self.second(out)
        if self.how != "unused":
            out = out + self.third(hidden_states)
        return (out, None) if self.how == "tuple" else out


IDS = [torch.arange(6).reshape(1, 6), torch.arange(8).reshape(2, 4)]


@pytest.mark.parametrize("how", ["plain", "tuple"])
def test_blocks_may_return_hidden_states_or_a_tuple(how):
    model = Toy(3, how)
    for ids, inputs in zip(IDS, first_inputs(model, model.layers, IDS), strict=True):
        assert torch.equal(inputs.hidden, model.embed(ids))
        assert inputs.calls == (((), {"scale": 3.0}),) * 3
        for block in model.layers:
            inputs = inputs.after(run_block(block, inputs))
        assert torch.equal(inputs.hidden, model(ids))


def test_linears_that_share_an_input_share_a_stage_wherever_they_are_called():
    model = Toy()
    (inputs,) = first_inputs(model, model.layers, IDS[:1])
    assert stages(model.layers[0], linears_of(model.layers[0]), inputs) == [
        ("first", "third"),
        ("second",),
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param(
            "scales",
            "Toy changes the hidden states between its .*--method rtn",
            id="works between blocks",
        ),
        pytest.param("skips", "Toy called 1 of its 2 decoder blocks", id="leaves a block out"),
    ],
)
def test_a_model_that_cannot_be_walked_is_refused_and_left_as_it_was(how, told):
    model = Toy(how=how)
    before = list(model.layers)
    with pytest.raises(ArchitectureError, match=told):
        first_inputs(model, model.layers, IDS)
    assert list(model.layers) == before


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param("twice", "second was called 2 times", id="called twice"),
        pytest.param(
            "unused", "third was called 0 times .*--ignore it or use --method rtn", id="not called"
        ),
    ],
)
def test_a_linear_that_is_not_called_once_is_refused(how, told):
    block = ToyBlock(how)
    with pytest.raises(ArchitectureError, match=told):
        stages(block, linears_of(block), BlockInput(torch.ones(1, 2, 4), (((), {"scale": 1.0}),)))
