"""The weight of a packed module: a tensor like any other, and free while no number is asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from small_kinds import small
from test_embedding_rows import TOKENS, WIDTH, table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmquant.algorithms import rtn
from llmquant.kernels.embedding.packed_embedding import PackedEmbedding
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.spec import QuantSpec


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[PackedLinear]:
    """Every packed linear that was decoded, each time."""
    found: list[PackedLinear] = []
    plain = PackedLinear.dequantize

    def dequantize(self: PackedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
        found.append(self)
        return plain(self, dtype)

    monkeypatch.setattr(PackedLinear, "dequantize", dequantize)
    return found


def test_what_it_is_costs_nothing(decoded: list[PackedLinear]) -> None:
    weight = PackedEmbedding(table(torch.bfloat16)).weight
    assert (weight.shape, weight.dtype) == ((TOKENS, WIDTH), torch.bfloat16)
    assert (weight.device.type, weight.ndim, weight.numel()) == ("cpu", 2, TOKENS * WIDTH)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert weight.detach().size(0) == TOKENS
    assert decoded == []


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "an operator": lambda w: w * 2,
    "the right operand": lambda w: torch.ones(3, TOKENS) @ w,
    "a function": lambda w: F.linear(torch.ones(3, WIDTH), w),
    "a row": lambda w: w[3],
    "transposed": lambda w: w.T.contiguous(),
    "cast": lambda w: w.to(torch.float64),
    "the same dtype": lambda w: w.to(torch.float32) + 0,
    "detached": lambda w: w.detach() + 0,
    "in a list": lambda w: torch.cat([w, w]),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "python": lambda w: torch.tensor(w.tolist()),
    "a parameter": lambda w: nn.Embedding(TOKENS, WIDTH, _weight=w)(torch.tensor([3, 0])),
    "cloned": lambda w: w.clone(),
    "copied": copy.deepcopy,
    "copied from": lambda w: torch.zeros(TOKENS, WIDTH).copy_(w),
    "shared": lambda w: w.share_memory_(),
    "pickled": lambda w: pickle.loads(pickle.dumps(w)),
    "saved": lambda w: load(save({"w": w}))["w"],
    "compiled": lambda w: torch.compile(lambda x: x + w, backend="eager")(torch.zeros(1)),
}


@pytest.mark.filterwarnings("ignore:Dynamo")  # it says that it looks into our caches
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_is_done_with_it(use: Callable[[Tensor], Tensor]) -> None:
    module = table()
    assert torch.equal(use(module.weight), use(module.dequantize(torch.float32)))


def test_it_is_decoded_once_and_keeps_what_is_written(decoded: list[PackedLinear]) -> None:
    module = table()
    weight = module.weight
    weight.mul_(2)
    weight[0] = 7
    expected = module.dequantize(torch.float32) * 2
    expected[0] = 7
    assert torch.equal(weight, expected)
    assert torch.equal(weight.detach(), expected)
    assert len(decoded) == 2  # one of them here


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        pytest.param("llama4_text", "embed_tokens", id="llama4: the device of its embeddings"),
        pytest.param("deepseek_v32", "weights_proj", id="deepseek_v32: the dtype of a linear"),
        pytest.param("mamba", "lm_head", id="mamba: the dtype of its head"),
    ],
)
def test_models_that_ask_for_more_than_they_use(
    kind: str, place: str, decoded: list[PackedLinear]
) -> None:
    model = AutoModelForCausalLM.from_config(small(kind), dtype=torch.float32).eval()
    names = [n for n, _ in model.named_modules() if n.endswith(place)]
    for name in names:
        weight = rtn(model.get_parameter(f"{name}.weight").detach(), QuantSpec(8, None))
        made = PackedLinear(weight, dtype=torch.float32, kernel="cpu")
        model.set_submodule(name, PackedEmbedding(made) if "embed" in name else made)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.isfinite().all()
    assert names
    assert decoded == []
