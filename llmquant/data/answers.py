"""Where in a chat, as the template writes it, an assistant's answers stand: what training learns
from, and what an evaluation of chats scores.

A template is asked three times for each answer: for what comes before it, ending with what an
answer begins with; for the same with the answer; and for the whole chat. Where each is the
beginning of the next, the answer is what is between the first two, its end-of-turn token included.
A template that writes earlier turns otherwise once later ones follow (it cuts what was thought) is
no such beginning; such an answer is left out and counted, and so are a chat without any and an
empty answer, of which only the end of the turn could be learned.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmquant.data.chats import Chat
from llmquant.data.sources import Documents, is_empty
from llmquant.data.template import NotRenderedError, render_chat
from llmquant.data.tokenize import Ids
from llmquant.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Learned: TypeAlias = NDArray[np.bool_]
_ANSWERS = "assistant"


def answer_spans(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, source: str, incomplete: Counter[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the characters ``[start, end)`` of each answer in it.

    ``incomplete`` counts what the template leaves out of it.

    Raises:
        SourceError, NotRenderedError: what :func:`llmquant.data.template.render_chat` raises of the
            whole chat.
    """
    text = render_chat(chat, tokenizer, source, incomplete)
    spans = []
    for i, message in enumerate(chat.messages):
        if i == 0 or message.role != _ANSWERS or message.empty:
            continue
        before, after = (Chat(chat.messages[:n], chat.tools) for n in (i, i + 1))
        try:
            head = render_chat(before, tokenizer, source, generation_prompt=True)
            until = render_chat(after, tokenizer, source)
        except NotRenderedError:
            continue
        if until.startswith(head) and text.startswith(until):
            spans.append((len(head), len(until)))
    return text, spans


def learned_rows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    dropped: Counter[str],
    partly: Counter[str],
) -> list[tuple[Ids, Learned]]:
    """Token ids of every row with, for each token, whether it is one to learn to predict: all of a
    plain text, of a chat those of the answers. Rows that give none are counted in ``dropped``, and
    in ``partly`` what is left out of the others.

    Raises:
        SourceError: a chat, and the tokenizer has no chat template or cannot tell where in a text
            its tokens stand.
    """
    rows: list[tuple[Ids, Learned]] = []
    for row in documents.rows:
        if is_empty(row):
            dropped["empty"] += 1
            continue
        if isinstance(row, str):
            ids = np.asarray(tokenizer(row, verbose=False)["input_ids"], dtype=np.int64)
            learned = np.ones(len(ids), np.bool_)
        else:
            try:
                ids, learned, lost = _chat_row(row, tokenizer, documents.source)
            except NotRenderedError as e:
                dropped[str(e)] += 1
                continue
            if not learned.any():
                dropped["chats without an answer that can be told from the rest"] += 1
                continue
            partly.update(lost)
        if not len(ids):
            dropped["no tokens"] += 1
            continue
        rows.append((ids, learned))
    return rows


def _chat_row(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[Ids, Learned, Counter[str]]:
    """Token ids, which of them are of answers, and what of the chat is left out."""
    lost: Counter[str] = Counter()
    text, spans = answer_spans(chat, tokenizer, source, lost)
    if not tokenizer.is_fast:
        raise SourceError(
            f"{source} holds chats, and this tokenizer has no fast version to tell where answers stand in them; "
            "name a field of plain text"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    places = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        learned |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
    answers = [m for m in chat.messages[1:] if m.role == _ANSWERS]
    empty = sum(m.empty for m in answers)
    if empty:
        lost["empty answers"] = empty
    if len(answers) - empty > len(spans):
        lost["answers that cannot be told from the rest"] = len(answers) - empty - len(spans)
    return ids, learned, lost
