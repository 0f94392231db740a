"""Replay against running everything again: the same bits, and parts whose weights are final are not
run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_walk import CPU, WINDOWS, plan_of, recipe_of
from tiny_models import random_model, save, token_windows
from torch import Tensor, nn

from llmquant.models.architectures import blocks_of, find
from llmquant.models.block_inputs import first_inputs, run_block
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.quantization.blocks.hidden_states import Placement, StateStore
from llmquant.quantization.blocks.inputs import STREAM
from llmquant.quantization.blocks.replay import Replay, Tail, Tails
from llmquant.quantization.walk import walk
from llmquant.recipe import Recipe

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
]
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "at once": {"gptq.true_sequential": False},
    "asymmetric": {"gptq.asymmetric": 0.5},
    "tuned": {"tune": {"steps": 2, "batch_size": 2}},
    "asymmetric and tuned": {
        "gptq.asymmetric": 0.5,
        "tune": {"steps": 2, "batch_size": 2, "target": "block"},
    },
    "awq": {"awq": {"grid": 3}},
}


def walked(
    folder: Path, recipe: Recipe, replays: bool
) -> tuple[dict[str, str], list[Tensor], Counter[str]]:
    """Digests of all weights, the states behind the last block, and how often each linear of the
    first block was called."""
    plan, calls = plan_of(folder, recipe), Counter[str]()
    for name in (n for n in plan.specs if ".0." in n):
        module = plan.model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: calls.update([name.rpartition(".")[2]]))
    store = StateStore(CPU, placement=Placement(replays=replays))
    digests = {
        n: w.digest()
        for block in walk(plan, WINDOWS, lambda _: None, store)
        for n, (w, _) in block.weights.items()
    }
    return digests, store.streams[STREAM][:], calls


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_and_without(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    recipe = recipe_of(**changes)
    folder = save(kind, tmp_path / "model")
    digests, states, calls = walked(folder, recipe, replays=True)
    again, expected, without = walked(folder, recipe, replays=False)
    assert digests == again
    assert all(map(torch.equal, states, expected))
    if changes == METHODS["at once"]:
        assert calls == without, "nothing is final before the block is done"
    else:
        assert all(calls[name] <= without[name] for name in without)


@pytest.mark.parametrize(
    "changes", [METHODS["gptq"], METHODS["asymmetric"]], ids=["gptq", "asymmetric"]
)
def test_attention_and_the_mlp_run_once_for_each_batch(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    _, _, calls = walked(save("llama", tmp_path / "model"), recipe_of(**changes), replays=True)
    _, _, without = walked(tmp_path / "model", recipe_of(**changes), replays=False)
    batches, shown = 4, 1  # one more pass of the first batch shows what shares an input
    both = 2 if changes else 1  # the original's passes beside
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert calls[name] == batches * both + shown, name
        assert without[name] > calls[name], name


def shown(block: nn.Module, kind: str = "llama") -> list[Tail]:
    model = random_model(kind)
    inputs = first_inputs(
        model,
        blocks_of(model, find(model, model.config.model_type)),
        [torch.stack(token_windows(2, 8))],
    )[0]
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    with Tails(block, linears) as watch:
        run_block(block, inputs)
    return watch.found()


def first_block(kind: str) -> nn.Module:
    model = random_model(kind)
    as_in_checkpoint(model, model.config.model_type)
    return blocks_of(model, find(model, model.config.model_type))[0]


def test_what_returns_its_last_linears_output_is_a_tail() -> None:
    attention = Tail(
        "self_attn", frozenset({f"self_attn.{n}_proj" for n in "qkv"}), "self_attn.o_proj", (None,)
    )
    mlp = Tail("mlp", frozenset({"mlp.gate_proj", "mlp.up_proj"}), "mlp.down_proj", None)
    assert shown(first_block("llama")) == [attention, mlp]
    assert [t.part for t in shown(first_block("mixtral"))] == ["self_attn"], "experts are run again"


def test_what_does_more_behind_it_is_run_again() -> None:
    block = first_block("llama")
    mlp = block.mlp
    run = mlp.forward
    mlp.forward = lambda x: run(x) * 2
    assert [t.part for t in shown(block)] == ["self_attn"]
    mlp.forward = run
    attention = block.self_attn.forward
    block.self_attn.forward = lambda *a, **k: (attention(*a, **k)[0], torch.ones(1))
    assert [t.part for t in shown(block)] == ["mlp"], "a second tensor is not kept"


class Twice(nn.Module):
    """A block of one part with two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x)
        return out


def test_nothing_is_kept_of_weights_that_change_or_outside_a_batch() -> None:
    block, x = Twice(), torch.randn(2, 4)
    ran: list[int] = []
    block.part[0].register_forward_hook(lambda *_: ran.append(0))
    tail = Tail("part", frozenset({"part.0"}), "part.1", None)
    with torch.no_grad():
        with Replay(block, [tail], {"part.0", "part.1"}) as replay:
            for _ in range(2):
                with replay.batch(0):
                    block(x)
            assert len(ran) == 2, "part.0 still changes"
            replay.settle(["part.0"])
            block(x)
            with replay.batch(0):
                expected = block(x)
            assert len(ran) == 4
            with replay.batch(0):
                assert torch.equal(block(x), expected)
            assert len(ran) == 4, "replayed"
            with replay.batch(1):
                block(x)
            assert len(ran) == 5, "another batch"
            block(x)
            assert len(ran) == 6, "outside a batch"
        block(x)
    assert len(ran) == 7
    assert "forward" not in block.part.__dict__
    assert not block.part[1]._forward_pre_hooks
