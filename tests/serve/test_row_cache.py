"""The server's cache of several sequences, as compiled decoding steps write into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

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
