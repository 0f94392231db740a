"""RowCache: keys and values of several sequences of different lengths, for one decoding step of all
of them at once.

Sequences are rows of one buffer and are aligned to the *right*: the newest token of every row
stands in the same column.

    column      0  1  2  3  4  5 │ end
    row 0       .  a  b  c  d  e │        "." is padding: zeros, always masked
    row 1       .  .  .  x  y  z │

A step then writes one column of all rows in place, and transformers' own mask code is right for
every kind of attention, since differences of columns are differences of positions (sliding windows
included). One row alone has no padding, needs no mask, and so runs the very arithmetic of
``model.generate``.

A row that leaves is replaced by the last one; a row that joins is copied in at the right. When its
last column is reached the buffer's contents move left: within it while the longest row leaves a
fifth of it free, else to one with a third more columns than that row, rounded up. Amortized, a
token is moved a constant number of times. It has rows for as many sequences as there were at once,
by powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_FIRST_COLUMNS = 256


class RowLayer(CacheLayerMixin):
    """One decoder layer's part: ``keys`` and ``values``, ``[rows, heads, columns, head_dim]``."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Of zeros, as all padding."""
        rows, columns = self.window.rows, self.window.columns
        self.keys, self.values = (
            t.new_zeros((rows, t.shape[1], columns, t.shape[3])) for t in (key_states, value_states)
        )
        self.is_initialized = True
        self.window.moves += 1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new column ``[rows, heads, 1, head_dim]``; returns all columns in use and the
        new one, or the first ``window.read`` where the new one's number is in a tensor."""
        w = self.window
        rows, used = len(w.lengths), slice(w.begin, w.end + 1)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if w.column is not None:
            keys[:rows].index_copy_(2, w.column, key_states)
            values[:rows].index_copy_(2, w.column, value_states)
            return keys[:rows, :, : w.read], values[:rows, :, : w.read]
        keys[:rows, :, w.end] = key_states[:, :, 0]
        values[:rows, :, w.end] = value_states[:, :, 0]
        return keys[:rows, :, used], values[:rows, :, used]

    def in_place(self) -> tuple[Tensor, Tensor, int] | None:
        """Where one sequence's keys and values ``[1, heads, columns, head_dim]`` begin and how many
        tokens they have; the next column is free. None where there are more sequences, or none
        yet."""
        w = self.window
        if self.keys is None or self.values is None or len(w.lengths) != 1:
            return None
        return self.keys[:1, :, w.begin :], self.values[:1, :, w.begin :], w.end - w.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.begin

    def get_max_length(self) -> int:
        return -1

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, once there are some."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class Window:
    """Which rows and columns are in use; shared by all layers.

    Attributes:
        rows, columns: that the buffers have.
        lengths: tokens in the cache, per row.
        end: the column that the next token goes to.
        column: the same as a tensor ``[1]``, while a step reads it there
            (:mod:`llmquant_serve.engines.batching.step_graph`).
        read: how many columns such a step reads.
        moves: how often the buffers became others.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows, self.columns = 1, _FIRST_COLUMNS
        self.lengths: list[int] = []
        self.end = 0
        self.column: Tensor | None = None
        self.read = 0
        self.moves = 0

    @property
    def begin(self) -> int:
        """The first column that any row uses."""
        return self.end - max(self.lengths, default=0)


class RowCache(Cache):
    """The KV cache of at most ``max_rows`` sequences, as transformers' models take it."""

    def __init__(self, layers: int, max_rows: int) -> None:
        self.window = Window(max_rows)
        self.rows: list[RowLayer] = [RowLayer(self.window) for _ in range(layers)]
        super().__init__(layers=list(self.rows))

    @property
    def lengths(self) -> Sequence[int]:
        return self.window.lengths

    def join(self, prefilled: Cache, length: int) -> None:
        """Copy in a sequence of ``length`` tokens from a cache of batch size 1, as the last row."""
        w = self.window
        row = len(w.lengths)
        assert row < w.max_rows
        if not w.lengths:
            w.end = length
        self._reserve(max(length, max(w.lengths, default=0)), row + 1)
        for layer, source in zip(self.rows, prefilled.layers, strict=True):
            assert isinstance(source, DynamicLayer)
            assert source.keys is not None
            assert source.values is not None
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            keys, values = layer.buffers()
            keys[row, :, w.end - length : w.end] = source.keys[0]
            values[row, :, w.end - length : w.end] = source.values[0]
        w.lengths.append(length)

    def leave(self, row: int) -> None:
        """Forget a row; the last row takes its place (and its number)."""
        w = self.window
        last, used = len(w.lengths) - 1, slice(w.begin, w.end)
        for layer in self.rows:
            for buffer in layer.buffers():
                if row != last:
                    buffer[row, :, used] = buffer[last, :, used]
                buffer[last, :, used] = 0  # a masked NaN is still a NaN
        w.lengths[row] = w.lengths[last]
        w.lengths.pop()
        if not w.lengths:
            self._release()

    def before_step(self) -> None:
        """Make sure that there is a column for the next token."""
        self._reserve(max(self.window.lengths), len(self.window.lengths))

    def after_step(self) -> None:
        """The column written by a forward pass becomes part of every row."""
        w = self.window
        w.end += 1
        for row in range(len(w.lengths)):
            w.lengths[row] += 1

    def mask(self, device: torch.device) -> Tensor:
        """int64 ``[rows, columns in use + 1]``, 1 where a row has a token; the step's own column
        included."""
        lengths = torch.tensor(self.window.lengths, device=device)
        width = max(self.window.lengths) + 1
        return (torch.arange(width, device=device) >= width - 1 - lengths[:, None]).long()

    def _reserve(self, longest: int, rows: int) -> None:
        """Make sure that ``longest`` columns fit before the newest token's end, that one more is
        free, and that there are so many rows; moves the contents if not."""
        w = self.window
        if longest <= w.end < w.columns and rows <= w.rows:
            return
        size, columns = w.rows, w.columns
        while size < rows:
            size = min(2 * size, w.max_rows)
        if longest * 5 >= columns * 4:  # so that the next move is far
            columns = column_step(longest + longest // 3 + 1)
        begin, width = w.begin, w.end - w.begin
        for layer in self.rows:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    _moved(t, size, columns, slice(begin, begin + width), longest)
                    for t in layer.buffers()
                )
        w.moves += (size, columns) != (w.rows, w.columns)
        w.rows, w.columns, w.end = size, columns, longest

    def _release(self) -> None:
        """An idle server should not keep the memory of its longest conversation. The first columns
        stay, and with them what was recorded over them."""
        w = self.window
        w.end = 0
        if w.columns <= _FIRST_COLUMNS:
            return
        w.rows, w.columns = 1, _FIRST_COLUMNS
        for layer in self.rows:
            layer.keys = layer.values = None
            layer.is_initialized = False


def column_step(least: int) -> int:
    """The first of 1, 1.5, 2, 3, 4, 6, 8 … times the first columns that is at least so much."""
    size = _FIRST_COLUMNS
    while size < least:
        size += size // 2
        if size < least:
            size += size // 3
    return size


def _moved(buffer: Tensor, rows: int, columns: int, used: slice, end: int) -> Tensor:
    """A buffer of such a size whose columns in use end at ``end``; the same one if it has that
    size."""
    part = buffer[:, :, used]
    if buffer.shape[0] == rows and buffer.shape[2] == columns:
        part = part.clone()
        buffer[:, :, used] = 0
        moved = buffer
    else:
        moved = buffer.new_zeros((rows, buffer.shape[1], columns, buffer.shape[3]))
    moved[: len(part), :, end - part.shape[2] : end] = part
    return moved
