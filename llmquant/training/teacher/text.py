"""The text that is trained on, and the other text that decides: windows of token ids with, for each
position, whether its next token counts.

Rows are laid end to end and cut into windows of exactly ``seqlen`` tokens, as calibration does it.
Held-out windows are drawn first; a window is one or the other, also where those come from a text
of their own. Of chats only the assistant's answers count.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint.manifest import Manifest
from llmquant.data.answers import Learned, learned_rows
from llmquant.data.calibration import draw
from llmquant.data.overlap import measure_overlap
from llmquant.data.sources import counted, read_documents
from llmquant.data.tokenize import Ids
from llmquant.errors import SourceError, UsageError
from llmquant.recipe_sections import QAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Pair = tuple[Ids, Learned]
_SALT = 1  # held-out windows and those trained on are drawn by different seeds


@dataclass(frozen=True, slots=True)
class Window:
    """``ids`` int64 ``[tokens]``; ``counts`` float32 ``[tokens - 1]``, 1 where the token after a
    position is one to learn."""

    ids: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class TrainingText:
    """Windows to train on and held-out ones, where they came from, and what should be said of
    them."""

    training: tuple[Window, ...]
    heldout: tuple[Window, ...]
    source: str
    source_sha256: str
    sha256: str
    lines: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """To learn, in an epoch."""
        return int(sum(float(w.counts.sum()) for w in self.training))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The windows that a folder was calibrated on: the hash of their text, and where in its tokens
    they begin."""

    source_sha256: str
    seqlen: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest | None) -> Calibrated | None:
        """As a folder's record tells; None where it does not, or where a window is a row."""
        if manifest is None or manifest.calibration is None or manifest.seed is None:
            return None
        told = manifest.calibration
        if told["packing"] != "concat":
            return None
        drawn = draw(told["windows_available"], told["windows"], manifest.seed)
        length = int(told["seqlen"])
        return cls(told["source_sha256"], length, tuple(i * length for i in drawn))

    def unseen(self, places: list[int], length: int) -> list[int]:
        """Which of the windows that begin at ``places`` have no token in common with these."""
        return [
            i
            for i, place in enumerate(places)
            if all(place + length <= s or s + self.seqlen <= place for s in self.starts)
        ]


def check_length(options: QAT, max_positions: int | None) -> None:
    """Raises UsageError for windows longer than the context."""
    if max_positions is not None and options.seqlen > max_positions:
        raise UsageError(
            f"qat.seqlen={options.seqlen} is more than the model's {max_positions} positions; "
            f"give {max_positions} or less"
        )


def read_text(
    options: QAT,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    vocab_size: int,
    max_positions: int | None,
    evaluation: str | None = None,
    calibrated: Calibrated | None = None,
) -> TrainingText:
    """The windows that a run trains on and those that it keeps out.

    Args:
        source: of the text.
        vocab_size: of the models; ids beyond are refused.
        max_positions: their context.
        evaluation: text that the model will be judged by; what of it is trained on is told.
        calibrated: what the start was calibrated on; windows of it are not held out, where others
            are left, since they would flatter the start.

    Raises:
        SourceError: no such source, too little text (says how much is needed), or a tokenizer of
            another model.
        UsageError: windows longer than the context.
    """
    check_length(options, max_positions)
    windows, facts = _windows(source, options, tokenizer, vocab_size)
    apart = options.heldout_source
    others = None if apart is None else _windows(apart, options, tokenizer, vocab_size)
    same = others is not None and others[1].sha256 == facts.sha256
    of = f" of it; {apart} is the same text" if same else f" of {apart}" if apart else ""
    if others is None or same:
        kept_out, left = _split(windows, facts, options, calibrated, seed)
    else:
        kept_out, left, facts = _apart(windows, facts, *others, options, seed)
    shown = min(len(left), options.steps * options.batch_size)  # more would be asked for in vain
    order = draw(len(left), min(options.nsamples or shown, shown), seed + _SALT)
    chosen = [left[i] for i in order]
    lines = [
        f"text       {source}",
        f"  training {len(chosen):,} of {len(windows):,} windows of {options.seqlen:,} tokens",
        f"  held out {len(kept_out):,} windows{of}",
        *([f"  dropped  {counted(facts.dropped)}"] if facts.dropped else []),
        *([f"  partly   {counted(facts.partly)}"] if facts.partly else []),
        *_overlap([c[0] for c in chosen], evaluation, tokenizer),
    ]
    return TrainingText(
        tuple(map(_window, chosen)),
        tuple(map(_window, kept_out)),
        facts.source,
        facts.sha256,
        _sha256([*chosen, *kept_out], len(chosen)),
        tuple(lines),
    )


def _overlap(
    windows: list[Ids], evaluation: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """How much of the text that the model will be judged by is trained on, as lines."""
    if evaluation is None:
        return []
    overlap = measure_overlap(windows, read_documents(evaluation), tokenizer)
    return [f"  {line}" for line in overlap.lines()]


def _split(
    windows: list[_Pair], facts: _Facts, options: QAT, calibrated: Calibrated | None, seed: int
) -> tuple[list[_Pair], list[_Pair]]:
    """Windows of one text: those that are held out, and the others."""
    wanted = options.nsamples or options.batch_size
    if len(windows) < wanted + options.heldout:
        raise SourceError(_too_little(facts, len(windows), wanted, options.heldout, options.seqlen))
    held = _held_out(len(windows), facts, options, calibrated, seed)
    left = sorted(set(range(len(windows))) - set(held))
    return [windows[i] for i in held], [windows[i] for i in left]


def _apart(
    windows: list[_Pair],
    facts: _Facts,
    others: list[_Pair],
    of_others: _Facts,
    options: QAT,
    seed: int,
) -> tuple[list[_Pair], list[_Pair], _Facts]:
    """Held-out windows of a text of their own, and those of the first that are not among them; and
    what the first has lost by that."""
    wanted = options.nsamples or options.batch_size
    if len(others) < options.heldout:
        raise SourceError(_too_little(of_others, len(others), 0, options.heldout, options.seqlen))
    held = [others[i] for i in draw(len(others), options.heldout, seed)]
    known = {ids.tobytes() for ids, _ in held}
    left = [w for w in windows if w[0].tobytes() not in known]
    twice = len(windows) - len(left)
    if twice:
        lost = {**facts.dropped, "windows that are held out": twice}
        facts = replace(facts, dropped=lost)
    if len(left) < wanted:
        raise SourceError(_too_little(facts, len(left), wanted, 0, options.seqlen))
    return held, left, facts


def _held_out(
    windows: int, facts: _Facts, options: QAT, calibrated: Calibrated | None, seed: int
) -> list[int]:
    """Which windows of the training text are kept out."""
    unseen = list(range(windows))
    if calibrated is not None and calibrated.source_sha256 == facts.sha256:
        fresh = calibrated.unseen(facts.places, options.seqlen)
        unseen = fresh if len(fresh) >= options.heldout else unseen
    return [unseen[i] for i in draw(len(unseen), options.heldout, seed)]


@dataclass(frozen=True, slots=True)
class _Facts:
    """Of a source: its name, its hash, its tokens, the rows that were left out and what was left
    out of others, and where its windows begin."""

    source: str
    sha256: str
    tokens: int
    dropped: dict[str, int]
    partly: dict[str, int]
    places: list[int]


def _windows(
    source: str, options: QAT, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[_Pair], _Facts]:
    """All windows with something to learn in them, in order."""
    documents = read_documents(source)
    dropped = Counter(documents.dropped)
    partly: Counter[str] = Counter()
    rows = learned_rows(documents, tokenizer, dropped, partly)
    stream = np.concatenate([ids for ids, _ in rows]) if rows else np.zeros(0, np.int64)
    learned = np.concatenate([mask for _, mask in rows]) if rows else np.zeros(0, np.bool_)
    if len(stream) and int(stream.max()) >= vocab_size:
        raise SourceError(
            f"{source}: the tokenizer gives token id {int(stream.max())}, but the model has {vocab_size} tokens; "
            "the tokenizer belongs to another model"
        )
    length = options.seqlen
    cut = [slice(i, i + length) for i in range(0, len(stream) - length + 1, length)]
    kept = [s for s in cut if learned[s][1:].any()]
    windows = [(stream[s], learned[s]) for s in kept]
    empty = len(cut) - len(windows)
    if empty:
        dropped["windows without an answer in them"] += empty
    lost = {reason: n for reason, n in sorted(dropped.items()) if n}
    places = [s.start for s in kept]
    kept_partly = dict(sorted(partly.items()))
    return windows, _Facts(
        documents.source, documents.sha256, len(stream), lost, kept_partly, places
    )


def _too_little(facts: _Facts, has: int, wanted: int, kept: int, seqlen: int) -> str:
    """A sentence: ``wanted`` windows are for training, and ``kept`` to be held out."""
    lost = f" (left out: {counted(facts.dropped)})" if facts.dropped else ""
    parts = [f"{wanted:,} windows to train on"] if wanted else []
    parts += [f"{kept:,} held-out ones"] if kept else []
    cut = facts.tokens // seqlen
    # Where only some windows can be used, more text has as many of them in proportion.
    needed = -(-(wanted + kept) * max(cut, 1) // max(has, 1)) if cut else wanted + kept
    more = "more than " if cut and not has else "about " if has < cut else ""
    return (
        f"{facts.source} gives {facts.tokens:,} tokens, {has:,} windows of {seqlen:,}{lost}; {' and '.join(parts)} "
        f"need {more}{needed * seqlen:,} tokens; give more text, a smaller --seqlen, --batch-size or --heldout"
    )


def _window(pair: _Pair) -> Window:
    ids, learned = pair
    return Window(torch.from_numpy(ids.copy()), torch.from_numpy(learned[1:].astype(np.float32)))


def _sha256(windows: list[_Pair], training: int) -> str:
    digest = hashlib.sha256(training.to_bytes(8, "little"))
    for ids, learned in windows:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        digest.update(learned.tobytes())
    return digest.hexdigest()
