"""Attention over grouped heads: transformers' numbers, by what a GPU has kernels for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_device import NAME, install
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmquant.kernels.gpu.attention import grouped_sdpa, use_grouped_sdpa

pytestmark = pytest.mark.device
BATCH, HEADS, GROUPS, COLUMNS, WIDTH = 2, 6, 3, 10, 8


class Attention(nn.Module):
    num_key_value_groups = GROUPS
    is_causal = True


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What torch was asked for: heads of queries and of keys, rows of queries, groups."""
    asked: list[tuple[Any, ...]] = []
    plain = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **more: Any) -> Tensor:
        asked.append((query.shape[1], key.shape[1], query.shape[2], more.get("enable_gqa", False)))
        return plain(query, key, *args, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    return asked


def drawn(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = HEADS // GROUPS
    shapes = ((HEADS, tokens), (heads, COLUMNS), (heads, COLUMNS))
    query, key, value = (
        torch.randn(BATCH, n, t, WIDTH, generator=generator).to(dtype) for n, t in shapes
    )
    return query, key, value


FIRST = torch.tensor([[0], [4]])
STEP = ((torch.arange(COLUMNS) >= FIRST) & (torch.arange(COLUMNS) <= 8))[:, None, None]
CASES = {
    "a prompt in float32": (COLUMNS, torch.float32, None, (HEADS, HEADS, COLUMNS, False)),
    "a prompt in bfloat16": (COLUMNS, torch.bfloat16, None, (HEADS, 2, COLUMNS, True)),
    "a step of two rows": (1, torch.float32, STEP, (2, 2, GROUPS, False)),
    "a step of two rows in bfloat16": (1, torch.bfloat16, STEP, (2, 2, GROUPS, False)),
}


@pytest.mark.parametrize(("tokens", "dtype", "mask", "asked"), CASES.values(), ids=CASES.keys())
def test_the_numbers_are_those_of_transformers(
    tokens: int, dtype: torch.dtype, mask: Tensor | None, asked: tuple[Any, ...],
    seen: list[tuple[Any, ...]],
) -> None:  # fmt: skip
    there = torch.device(NAME, 0) if install() else None
    inputs = drawn(tokens, dtype)
    wanted, _ = sdpa_attention_forward(Attention(), *inputs, mask)
    seen.clear()
    placed = [None if t is None else t.to(there) for t in (*inputs, mask)]
    found, _ = grouped_sdpa(Attention(), *placed)  # type: ignore[arg-type]
    assert seen == [asked]
    assert found.shape == wanted.shape == (BATCH, tokens, HEADS, WIDTH)
    close = {"atol": 1e-6} if dtype is torch.float32 else {"atol": 2e-2}
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, **close)


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "register", taken.__setitem__)
    for name in ("cpu", "mps", "xpu"):
        use_grouped_sdpa(torch.device(name))
    assert taken == {}
    use_grouped_sdpa(torch.device("cuda"))
    assert taken == {"sdpa": grouped_sdpa}
    same = [f(Attention(), *drawn(1, torch.float32), STEP)[0] for f in (grouped_sdpa, sdpa_attention_forward)]  # fmt: skip
    assert torch.equal(*same)
