"""The pretend accelerator notices what a real one would."""

from __future__ import annotations

import gc

import pytest
import torch
from pretend_device import NAME, WaitedError, ledger, no_waiting, on_device
from torch import nn

pytestmark = pytest.mark.device


def test_it_computes_as_the_cpu_does() -> None:
    x, w = torch.randn(3, 8), torch.randn(8, 8)
    there = (x.to(NAME) @ w.to(NAME).T).softmax(-1)
    assert on_device(there)
    assert torch.equal(there.cpu(), (x @ w.T).softmax(-1))
    view = there.T
    view[0].mul_(2)
    assert torch.equal(there[:, 0].cpu(), 2 * (x @ w.T).softmax(-1)[:, 0])  # one memory


def test_gradients_stay_on_it() -> None:
    layer = nn.Linear(4, 2).to(NAME)
    layer(torch.ones(1, 4, device=NAME)).sum().backward()
    assert on_device(layer.weight.grad)


@pytest.mark.parametrize("host", [torch.ones(3), torch.ones(1)], ids=["a vector", "one number"])
def test_a_tensor_left_on_the_cpu_is_refused(host: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.ones(3, device=NAME) + host
    assert torch.equal(
        (torch.ones(3, device=NAME) + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0)
    )


def test_transfers_and_waits_are_counted() -> None:
    with ledger() as seen:
        x = torch.ones(4).to(NAME)
        x[0].item()
        x.tolist()
        x.cpu()
        x[x > 0]
        bool((x > 0).all())
    assert (seen.to_device, seen.to_host) == (1, 1)
    assert seen.waits == {
        "aten::_local_scalar_dense": 2, "tolist": 1, "copy to the host": 1, "aten::index": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "act", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0]],
    ids=["item", "tolist", "cpu", "mask"],
)  # fmt: skip
def test_a_wait_where_none_may_be_fails(act) -> None:
    x = torch.ones(4, device=NAME)
    with torch.inference_mode(), no_waiting():
        x + x
        with pytest.raises(WaitedError, match="waits for the device"):
            act(x)


def test_memory_is_counted_once_and_let_go() -> None:
    gc.collect()
    with ledger() as seen:
        before = seen.live
        x = torch.empty(256, device=NAME)
        y = x.view(16, 16).T
        assert seen.live - before == 1024
        del x
        assert seen.live - before == 1024
        del y
        gc.collect()
        assert seen.live == before
        assert seen.peak == 1024


def test_more_than_it_has_is_refused() -> None:
    with ledger(cap=2000):
        x = torch.empty(256, device=NAME)
        with pytest.raises(torch.OutOfMemoryError, match="pretend out of memory"):
            x.clone()
    x.clone()


@pytest.mark.parametrize("act", ["allocate", "wait", "mix"])
def test_a_backward_pass_is_watched_too(act: str) -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if act == "allocate":
                gradient = gradient.repeat(64).view(64, -1).sum(0)
            elif act == "wait":
                gradient = gradient * gradient.sum().item()
            else:
                gradient = gradient + torch.ones(len(gradient))
            return gradient

    x = torch.ones(256, device=NAME, requires_grad=True)
    loss = Faulty.apply(x).sum()
    gc.collect()
    expected = {"allocate": torch.OutOfMemoryError, "wait": WaitedError, "mix": RuntimeError}[act]
    with ledger(cap=16_384), no_waiting(), pytest.raises(expected):
        loss.backward()
    loss.detach() + 1  # it is over


def test_its_numbers_cannot_be_read_from_the_host() -> None:
    with pytest.raises(TypeError, match="convert pretend device type tensor to numpy"):
        torch.ones(3, device=NAME).numpy()
