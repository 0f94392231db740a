"""The server's cache of several sequences, as compiled decoding steps write into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llmquant_serve.engines.row_cache import RowCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def random_states(tokens: int) -> Tensor:
    return torch.randn(1, HEADS, tokens, WIDTH)


def prefilled(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(random_states(tokens), random_states(tokens), layer)
    return cache


@pytest.mark.parametrize("tokens", [1, 5, 255, 256, 300])
def test_one_sequence_written_in_place_is_one_written_by_update(tokens):
    """Over moves of the buffer too: the first one has 256 columns."""
    source = prefilled(tokens)
    one, other = RowCache(LAYERS, 4), RowCache(LAYERS, 4)
    for cache in (one, other):
        cache.join(source, tokens)
    for step in range(70):
        one.before_step()
        other.before_step()
        for mine, theirs in zip(one.rows, other.rows, strict=True):
            key, value = random_states(1), random_states(1)
            place = mine.in_place()
            assert place is not None
            keys, values, held = place
            assert held == tokens + step
            assert keys.shape[2] > held, "the next column is free"
            keys[:, :, held], values[:, :, held] = key[:, :, 0], value[:, :, 0]
            wanted = theirs.update(key, value)
            assert torch.equal(keys[:, :, : held + 1], wanted[0])
            assert torch.equal(values[:, :, : held + 1], wanted[1])
        one.after_step()
        other.after_step()


def test_a_row_that_was_alone_or_is_again_is_written_where_it_is():
    cache = RowCache(LAYERS, 4)
    (layer, _) = cache.rows
    assert layer.in_place() is None, "there is no sequence"
    short, long = prefilled(3), prefilled(9)
    cache.join(short, 3)
    assert layer.in_place() is not None
    cache.join(long, 9)
    assert layer.in_place() is None, "there are two"
    cache.leave(0)
    place = layer.in_place()
    assert place is not None
    keys, values, held = place
    assert held == 9
    assert torch.equal(keys[:, :, :held], long.layers[0].keys)
    assert torch.equal(values[:, :, :held], long.layers[0].values)
    cache.leave(0)
    assert layer.in_place() is None


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_what_a_row_leaves_harms_no_other(leaving: int) -> None:
    """One that overflowed to NaN is masked, and a masked NaN is still a NaN."""
    cache, lengths = RowCache(LAYERS, 4), [7, 9, 3]
    sources = [prefilled(n) for n in lengths]
    for layer in sources[leaving].layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.values is not None
        layer.values.fill_(torch.nan)
    for source, n in zip(sources, lengths, strict=True):
        cache.join(source, n)
    cache.leave(leaving)
    cache.join(prefilled(2), 2)
    for layer in cache.rows:
        keys, values = layer.update(
            random_states(1).repeat(3, 1, 1, 1), torch.zeros(3, HEADS, 1, WIDTH)
        )
        weights = cache.mask(keys.device)[:, None, None].float()
        assert (weights @ values).isfinite().all()
        padding = (keys[row, :, : -1 - n] for row, n in enumerate(cache.lengths))
        assert all(p.eq(0).all() for p in padding)
