"""A text as the token stream of one protocol: ids, windows over them, and how many words and bytes
each token stands for.

For ``ppl/gptq`` and ``ppl/strided`` the rows of the text are one text, joined by two newlines and
tokenized once. For ``ppl/word`` every row is a document of its own, tokenized alone after a prefix
token, as lm-eval does it: the tokenizer adds its special tokens (so a Llama document begins with
two BOS, the second of them scored) unless the text itself begins with the prefix.

Words are runs between white space, ``len(re.split(r"\\s+", document))``, bytes are UTF-8, both
counted in the document as it was before any detokenizer. A document's words and bytes are shared
out evenly over its scored tokens: sums over whole documents are exact, and windows of one document
can still be distinguished for the standard error.

For ``ppl/chat`` every row is a chat, written by the tokenizer's template, which puts the special
tokens; the answers in it are found as training finds them. Rows without one are counted.

A protocol with a BOS in every window tokenizes without special tokens, and its stream has the
windows one after another, each with its BOS: what windows share is in it more than once.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmquant.errors import SourceError, UnfitModelError, UsageError
from llmquant_eval.report.statistics import Floats
from llmquant_eval.scoring.protocols import RollingProtocol, TokenWindow, WindowProtocol
from llmquant_eval.scoring.window_layout import WindowLayout
from llmquant_eval.texts.tokens import encode
from llmquant_eval.texts.wikitext import wikitext_detokenize

if TYPE_CHECKING:
    from torch import Tensor

    from llmquant import Documents


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """``ids`` int64 ``[tokens]``; the ``windows`` to score of ``available``; ``words`` and
    ``bytes_`` per scored token.

    ``words`` and ``bytes_`` are None where the protocol does not count them. ``tokens`` are those
    of the text; ``ids`` may repeat some. ``dropped``: rows that gave no window, by reason;
    ``partly``: what is left out of others.
    ``chats``: the window, by number, that each chat begins with.
    """

    protocol: WindowProtocol
    ids: Tensor
    windows: Sequence[TokenWindow]
    available: int
    words: Floats | None = None
    bytes_: Floats | None = None
    text_tokens: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    partly: Mapping[str, int] = field(default_factory=dict)
    chats: Sequence[int] | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.text_tokens is None else self.text_tokens

    @property
    def layout(self) -> WindowLayout:
        return WindowLayout.of(self.windows, self.protocol.overlapping, self.chats)

    def reaching(self, tokens: int) -> int:
        """How many windows, at least two, hold so many tokens; all of them if they hold fewer."""
        held = np.cumsum([w.fed + 1 for w in self.windows])
        return min(max(2, int(np.searchsorted(held, tokens)) + 1), len(self.windows))

    def sha256(self) -> str:
        """In hex, over the ids and the windows to be scored."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        windows = [(w.begin, w.end, w.scored) for w in self.windows]
        digest.update(np.array(windows, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def first(self, windows: int) -> TokenStream:
        """The same stream with its first ``windows`` windows alone."""
        kept = self.windows[:windows]
        scored = sum(w.predictions for w in kept)
        words, bytes_ = (None if a is None else a[:scored] for a in (self.words, self.bytes_))
        chats = None if self.chats is None else [c for c in self.chats if c < windows]
        return replace(self, windows=kept, words=words, bytes_=bytes_, chats=chats)


def make_stream(
    protocol: WindowProtocol, tokenizer: Any, documents: Documents, source: str, limit: int | None
) -> TokenStream:
    """The stream of a text for one protocol, at most ``limit`` windows of it.

    Raises:
        SourceError: the text is empty, has no token, or is shorter than one window; for
            ``ppl/chat`` a row that is no chat, or no answer in any.
        UsageError: a limit below 1, or a BOS in every window of a tokenizer that has none.
        CheckpointError: the protocol wants a prefix token and the tokenizer has none.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--max-windows {limit} leaves nothing to score; give 1 or more")
    if isinstance(protocol, RollingProtocol):
        make = _by_answer if protocol.family == "chat" else _by_document
        whole = make(protocol, tokenizer, documents, source)
    else:
        ids = encode(tokenizer, _plain_text(documents), source, specials=not protocol.bos)
        windows = protocol.windows(len(ids))
        whole = TokenStream(protocol, ids, windows, len(windows))
    if not whole.windows:
        fitting = f" or --window {len(whole.ids)} or less" if len(whole.ids) > 2 else ""
        raise SourceError(
            f"{source} has {len(whole.ids)} tokens, less than one window of {protocol.window}; "
            f"give a longer text{fitting}"
        )
    wanted = whole if limit is None else whole.first(limit)
    return _with_bos(wanted, tokenizer) if protocol.bos else wanted


def _with_bos(stream: TokenStream, tokenizer: Any) -> TokenStream:
    """The stream with a BOS in front of each window that does not begin with one, and without the
    oldest token of a window that would be too long with it."""
    import torch

    bos = tokenizer.bos_token_id
    if bos is None:
        raise UsageError(
            f"{stream.protocol.perplexity_id}: the tokenizer has no BOS token; leave out --bos each-window"
        )
    parts: list[Tensor] = []
    windows: list[TokenWindow] = []
    start = 0
    for window in stream.windows:
        begin, prefix = window.begin, [bos]
        if int(stream.ids[begin]) == bos:
            prefix = []
        elif window.fed + 1 > stream.protocol.window:
            begin += 1
        parts += [torch.tensor(prefix, dtype=torch.int64), stream.ids[begin : window.end]]
        moved = window.moved(start + len(prefix) - begin)
        end = moved.end
        windows.append(TokenWindow(start, end, moved.scored))
        start = end
    return replace(stream, ids=torch.cat(parts), windows=windows, text_tokens=stream.tokens)


def _plain_text(documents: Documents) -> str:
    """All rows as one text.

    Raises:
        SourceError: rows are chats.
    """
    try:
        return documents.text()
    except SourceError as e:
        raise SourceError(f"{e}, or score the answers with --protocol ppl/chat") from e


def _by_answer(
    protocol: RollingProtocol, tokenizer: Any, documents: Documents, source: str
) -> TokenStream:
    """A stream of chats, one after another, whose windows score the answers."""
    import torch

    import llmquant

    plain = sum(isinstance(row, str) for row in documents.rows)
    if plain:
        raise SourceError(
            f"{source}: {plain} of {len(documents.rows)} rows are plain text, not chats, and {protocol.perplexity_id} scores "
            "an assistant's answers; name the field with the messages, or choose another protocol"
        )
    dropped, partly = Counter[str](), Counter[str]()
    ids: list[Any] = []
    windows: list[TokenWindow] = []
    chats: list[int] = []
    start = 0
    for row, scored in llmquant.learned_rows(documents, tokenizer, dropped, partly):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], scored.astype(np.int8), [0]])))
        chats.append(len(windows))
        for first, end in edges.reshape(-1, 2).tolist():
            windows += [w.moved(start) for w in protocol.between(first, end)]
        ids.append(row)
        start += len(row)
    if not windows:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise SourceError(
            f"{source} has no answer of an assistant to score{f' ({why})' if why else ''}; give chats with one"
        )
    stream = torch.from_numpy(np.concatenate(ids))
    return TokenStream(
        protocol, stream, windows, len(windows), dropped=dropped, partly=partly, chats=chats
    )


def prefix_token(tokenizer: Any) -> int:
    """What stands before a document: BOS, else EOS.

    Raises:
        CheckpointError: the tokenizer has neither.
    """
    prefix = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if prefix is None:
        raise UnfitModelError(
            "the tokenizer has neither a BOS nor an EOS token; ppl/word needs one before each document"
        )
    return int(prefix)


def _by_document(
    protocol: RollingProtocol, tokenizer: Any, documents: Documents, source: str
) -> TokenStream:
    import torch

    _plain_text(documents)
    if not any(isinstance(row, str) and row.strip() for row in documents.rows):
        raise SourceError(f"{source} has no text in it; give a source with some")
    prefix = prefix_token(tokenizer)
    ids: list[int] = []
    windows: list[TokenWindow] = []
    words, sizes = [], []
    spare_words = spare_bytes = 0
    for row in documents.rows:
        assert isinstance(row, str)
        tokens = _document_tokens(
            tokenizer,
            wikitext_detokenize(row) if protocol.family == "word-wikitext" else row,
            prefix,
            specials=not protocol.bos,
        )
        count, size = len(re.split(r"\s+", row)), len(row.encode("utf-8"))
        if (
            not tokens
        ):  # an empty row has no token to carry its word: lm-eval counts it, so the others do
            spare_words, spare_bytes = spare_words + count, spare_bytes + size
            continue
        windows += [w.moved(len(ids)) for w in protocol.windows(len(tokens))]
        ids += [prefix, *tokens]
        words.append(np.full(len(tokens), count / len(tokens)))
        sizes.append(np.full(len(tokens), size / len(tokens)))
    if not ids:
        raise SourceError(f"the tokenizer makes no token of {source}; give a text that it knows")
    per_word, per_byte = np.concatenate(words), np.concatenate(sizes)
    return TokenStream(
        protocol, torch.tensor(ids, dtype=torch.int64), windows, len(windows),
        per_word + spare_words / len(per_word), per_byte + spare_bytes / len(per_byte),
    )  # fmt: skip


def _document_tokens(tokenizer: Any, text: str, prefix: int, *, specials: bool) -> list[int]:
    """Tokens as lm-eval's Hugging Face model takes them: default special tokens, none if the text
    has its own prefix or ``specials`` is False."""
    if not specials or text.startswith(tokenizer.decode(prefix)):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(text, verbose=False)["input_ids"])
