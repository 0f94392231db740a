"""The server's cache of several sequences, as compiled decoding steps write into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llmquant_serve.engines.batching.row_cache import RowCache

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


def sized(cache: RowCache) -> tuple[int, int]:
    """Rows and columns of the buffers."""
    keys = cache.rows[0].keys
    assert keys is not None
    return keys.shape[0], keys.shape[2]


@pytest.mark.parametrize("tokens", [200, 300, 1000, 4096, 5000])
def test_a_sequence_alone_takes_little_more_than_it_needs(tokens: int) -> None:
    cache = RowCache(LAYERS, 8)
    cache.join(prefilled(tokens), tokens)
    rows, columns = sized(cache)
    assert rows == 1
    assert tokens < columns <= max(256, 2 * tokens)


def test_there_are_rows_for_as_many_as_there_were_at_once() -> None:
    cache = RowCache(LAYERS, 6)
    for count, rows in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)):
        cache.join(prefilled(3), 3)
        assert (len(cache.lengths), sized(cache)[0]) == (count, rows)


def test_a_move_within_the_buffer_is_no_other_buffer() -> None:
    """What is recorded over it stays right."""
    cache = RowCache(LAYERS, 4)
    long, short = prefilled(190), prefilled(3)
    for source, n in ((long, 190), (short, 3)):
        cache.join(source, n)
    cache.leave(0)
    moves, (layer, _) = cache.window.moves, cache.rows
    before = layer.keys
    assert before is not None
    for _ in range(70):
        cache.before_step()
        layer.update(random_states(1), random_states(1))
        cache.rows[1].update(random_states(1), random_states(1))
        cache.after_step()
    keys, _ = layer.update(random_states(1), random_states(1))
    assert (cache.window.moves, layer.keys is before) == (moves, True)
    assert cache.window.end < 90
    assert torch.equal(keys[:, :, :3], short.layers[0].keys)
    assert before[:, :, 90:].eq(0).all()


@pytest.mark.parametrize(("tokens", "kept"), [(9, True), (300, False)])
def test_an_idle_cache_keeps_the_first_columns_alone(tokens: int, kept: bool) -> None:
    cache = RowCache(LAYERS, 4)
    cache.join(prefilled(tokens), tokens)
    moves = cache.window.moves
    cache.leave(0)
    assert (cache.rows[0].keys is not None) == kept
    cache.join(prefilled(5), 5)
    assert (cache.window.moves == moves, sized(cache)) == (kept, (1, 256))
