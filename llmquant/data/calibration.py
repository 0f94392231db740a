"""Calibration: the token windows that quantization looks at, where they came from, and what was
left out.

Two packings:

* ``concat``: every row is tokenized as the tokenizer does by default (so a BOS stands where it puts
  one), the rows are laid end to end and cut into windows of exactly ``seqlen``; ``nsamples`` of
  those are drawn without replacement.
* ``sample``: one row is one window, cut at ``seqlen`` and never padded; rows under ``MIN_TOKENS``
  are dropped.

Nothing is silent: ``rows_read == rows_used + rows_not_drawn + sum(dropped)``, tokens of used rows
that fell outside the windows are counted, and fewer windows than asked for is an error that says
what would work. The draw orders the candidates by the raw 64-bit stream of PCG64, which numpy keeps
the same across versions and machines.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmquant.data.overlap import Overlap, measure_overlap
from llmquant.data.sources import Documents, counted
from llmquant.data.tokenize import Ids, tokenize
from llmquant.errors import SourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["concat", "sample"]
MIN_TOKENS = 8
"""A row of fewer tokens is no sample."""


@dataclass(frozen=True, slots=True)
class CalibrationSummary:
    """What was read, used and left out. ``tokens_truncated``: tokens of used rows that are in no
    window; ``incomplete``: chats of which the chat template leaves out a part."""

    packing: Packing
    seqlen: int
    windows: int
    windows_available: int
    rows_read: int
    rows_used: int
    rows_truncated: int
    rows_not_drawn: int
    dropped: Mapping[str, int]
    duplicates: int
    tokens_total: int
    tokens_used: int
    tokens_truncated: int
    overlap: Overlap | None = None
    incomplete: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The summary for people, one fact a line."""
        dropped = counted(self.dropped) or "none"
        lines = [
            f"windows  {self.windows:,} of {self.windows_available:,} available, "
            f"{'exactly' if self.packing == 'concat' else 'at most'} {self.seqlen:,} tokens each ({self.packing})",
            f"tokens   {self.tokens_used:,} used of {self.tokens_total:,}",
            f"rows     {self.rows_used:,} used of {self.rows_read:,} read; {self.rows_not_drawn:,} not drawn; "
            f"dropped: {dropped}; {self.duplicates:,} duplicates",
            f"cut      {self.rows_truncated:,} of the used rows, {self.tokens_truncated:,} tokens",
        ]
        if self.incomplete:
            lines.append(f"partly   {counted(self.incomplete)}")
        if self.overlap is not None:
            lines += self.overlap.lines()
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for the manifest."""
        plain = asdict(self)
        if self.overlap is not None and not self.overlap.dropped:
            del plain["overlap"]["dropped"]
        if not self.incomplete:
            del plain["incomplete"]
        return plain


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids (int64, 1-D, none padded) and their origin. ``sha256`` covers lengths
    and ids, in order."""

    windows: tuple[Tensor, ...]
    summary: CalibrationSummary
    sha256: str
    source: str
    source_sha256: str
    seed: int
    seqlen: int
    packing: Packing


@dataclass(frozen=True, slots=True)
class _Pick:
    """Windows drawn from tokenized rows; the row figures are those of the summary."""

    windows: list[Ids]
    available: int
    rows_used: int
    rows_truncated: int
    tokens_truncated: int


def calibrate(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    packing: Packing = "concat",
    evaluation: Documents | None = None,
    vocab_size: int | None = None,
    max_positions: int | None = None,
) -> Calibration:
    """Draw ``nsamples`` windows of (at most) ``seqlen`` tokens.

    Args:
        evaluation: the text the model will be evaluated on; the overlap with it is measured.
        vocab_size: rows of the model's embedding; ids beyond are refused.
        max_positions: the model's context; a longer ``seqlen`` is refused.

    Raises:
        UsageError: a number that cannot be right.
        SourceError: too little text, chats without a chat template, or ids that the model does not
            have.
    """
    check_numbers(nsamples, seqlen, seed, packing, max_positions)
    dropped = Counter(documents.dropped)
    incomplete: Counter[str] = Counter()
    rows = list(tokenize(documents, tokenizer, dropped, incomplete=incomplete))
    total = sum(map(len, rows))
    if packing == "sample":
        dropped[f"shorter than {MIN_TOKENS} tokens"] += sum(len(row) < MIN_TOKENS for row in rows)
        rows = [row for row in rows if len(row) >= MIN_TOKENS]
    pick = (_concat if packing == "concat" else _sample)(rows, nsamples, seqlen, seed)
    if pick.available < nsamples:
        raise SourceError(
            _too_little(documents, dropped, rows, pick.available, nsamples, seqlen, packing)
        )
    _check_ids(pick.windows, vocab_size, documents.source)
    summary = CalibrationSummary(
        packing, seqlen, len(pick.windows), pick.available,
        documents.rows_read, pick.rows_used, pick.rows_truncated, len(rows) - pick.rows_used,
        {reason: count for reason, count in sorted(dropped.items()) if count}, documents.duplicates,
        total, sum(map(len, pick.windows)), pick.tokens_truncated,
        None if evaluation is None else measure_overlap(pick.windows, evaluation, tokenizer),
        dict(sorted(incomplete.items())),
    )  # fmt: skip
    windows = tuple(torch.from_numpy(window.copy()) for window in pick.windows)
    sha256 = _sha256(pick.windows)
    return Calibration(
        windows, summary, sha256, documents.source, documents.sha256, seed, seqlen, packing
    )


def check_numbers(
    nsamples: int, seqlen: int, seed: int, packing: str, max_positions: int | None
) -> None:
    """Raises UsageError for numbers that no text can make right; see :func:`calibrate`."""
    if nsamples < 1 or seqlen < MIN_TOKENS or seed < 0:
        raise UsageError(
            f"nsamples={nsamples}, seqlen={seqlen}, seed={seed} are not possible; give at least 1, {MIN_TOKENS} and 0"
        )
    if packing not in ("concat", "sample"):
        raise UsageError(f"packing={packing!r} is unknown; choose concat or sample")
    if max_positions is not None and seqlen > max_positions:
        raise UsageError(
            f"seqlen={seqlen} is more than the model's {max_positions} positions; give {max_positions} or less"
        )


def draw(candidates: int, count: int, seed: int) -> list[int]:
    """``count`` different indices below ``candidates``, in an order that only ``seed`` decides."""
    keys = np.random.PCG64(seed).random_raw(candidates)
    return [int(i) for i in np.argsort(keys, kind="stable")[:count]]


def _concat(rows: list[Ids], nsamples: int, seqlen: int, seed: int) -> _Pick:
    stream = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    ends = np.cumsum([len(row) for row in rows])
    available = len(stream) // seqlen
    starts = [i * seqlen for i in draw(available, nsamples, seed)]
    inside = np.zeros(len(rows), np.int64)  # tokens of each row that lie in a drawn window
    for start in starts:
        row = int(np.searchsorted(ends, start, side="right"))
        while row < len(rows) and ends[row] - len(rows[row]) < start + seqlen:
            inside[row] += min(ends[row], start + seqlen) - max(ends[row] - len(rows[row]), start)
            row += 1
    cut = np.array([len(row) for row in rows], np.int64)[inside > 0] - inside[inside > 0]
    windows = [stream[start : start + seqlen] for start in starts]
    return _Pick(windows, available, int((inside > 0).sum()), int((cut > 0).sum()), int(cut.sum()))


def _sample(rows: list[Ids], nsamples: int, seqlen: int, seed: int) -> _Pick:
    drawn = [rows[i] for i in draw(len(rows), nsamples, seed)]
    cut = [len(row) - seqlen for row in drawn if len(row) > seqlen]
    return _Pick([row[:seqlen] for row in drawn], len(rows), len(drawn), len(cut), sum(cut))


def _too_little(
    documents: Documents,
    dropped: Mapping[str, int],
    rows: list[Ids],
    available: int,
    nsamples: int,
    seqlen: int,
    packing: Packing,
) -> str:
    """Why the text is too little, and the numbers that would work."""
    source, read = documents.source, documents.rows_read
    lost = counted(dict(sorted(dropped.items())))
    if not rows:
        return f"{source}: none of its {read:,} rows can be used ({lost}); name another field or source"
    lost = f" (left out of its {read:,} rows: {lost})" if lost else ""
    fits = [f"--nsamples {available}"] if available else []
    if packing == "sample":
        has = f"{len(rows):,} rows of {MIN_TOKENS} tokens or more"
        wanted = f"{nsamples:,} windows of one row each"
    else:
        total = sum(map(len, rows))
        has = f"{total:,} tokens in {len(rows):,} rows"
        wanted = f"{nsamples:,} windows of {seqlen:,} tokens"
        fits += [f"--seqlen {total // nsamples}"] if total // nsamples >= MIN_TOKENS else []
    return (
        f"{source} gives {has}{lost}, too little for {wanted}; "
        f"give {' or '.join([*fits, 'more text'])}"
    )


def _check_ids(windows: list[Ids], vocab_size: int | None, source: str) -> None:
    highest = max(int(window.max()) for window in windows)
    if vocab_size is not None and highest >= vocab_size:
        raise SourceError(
            f"{source}: the tokenizer gives token id {highest}, but the model's embedding has {vocab_size} rows; "
            "the tokenizer belongs to another model"
        )


def _sha256(windows: Sequence[Ids]) -> str:
    """Over every window: its length, then its ids, as little-endian int64."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(len(window).to_bytes(8, "little") + window.astype("<i8").tobytes())
    return digest.hexdigest()
