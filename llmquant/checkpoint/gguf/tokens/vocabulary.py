"""The tokens of a GGUF file: what each is called, which stand for themselves wherever a text holds
them, which ids end, begin or pad a text, and whether the file makes sense there.

llama.cpp (llama-vocab.cpp) finds tokens of the types CONTROL and USER_DEFINED by their literal
text, before anything is split; the others are found by merges, in a byte-level vocabulary spelled
in GPT-2's alphabet, a character for each byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.errors import CheckpointError

CONTROL = 3  # tokenizer.ggml.token_type of special tokens
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
# Which ids llama.cpp takes of a sentencepiece vocabulary that names none, and their types.
_USUAL = {"unknown": (0, _UNKNOWN), "bos": (1, CONTROL), "eos": (2, CONTROL)}
# Names of ids in llama.cpp's keys; those that transformers has an attribute for, and its name.
NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_SPECIAL = (*NAMED, "eot", "eom")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens, checked.

    Attributes:
        tokens: text by id.
        special: ids that a key of the file names, by the key's name: ``bos`` → 1.
        whole: ids of tokens that are found by their literal text → whether they are special.
    """

    tokens: Sequence[str]
    special: Mapping[str, int]
    whole: Mapping[int, bool]

    def named(self, name: str) -> str | None:
        """The text of a special token; None where the file has none."""
        found = self.special.get(name)
        return None if found is None else self.tokens[found]

    def byte_level(self) -> dict[str, int]:
        """Id by token, for byte-level BPE. Tokens that are whole are as the file has them; others
        are spelled in the alphabet, as transformers does, unless that is another token."""
        found = {text: i for i, text in enumerate(self.tokens)}
        for i, text in enumerate(self.tokens):
            spelled = text if i in self.whole else _spelled(text)
            if spelled != text and found.setdefault(spelled, i) == i:
                del found[text]
        return dict(sorted(found.items(), key=lambda pair: pair[1]))


def vocabulary_of(model: GgufFile) -> Vocabulary:
    """A file's tokens.

    Raises:
        CheckpointError: none, or some that make no sense: twice the same, more than embeddings, an
            id beyond them, a merge of what is no token.
    """
    said, path = model.metadata, model.path
    tokens = said.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(
            f"{path} has no tokenizer (tokenizer.ggml.tokens); fetch a conversion with one"
        )
    _check_list(path, "tokens", tokens, str, 1)
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]  # as llama.cpp calls them
    types = said.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    _check_list(path, "token_type", types, int, len(tokens))
    _refuse_doubles(path, tokens)
    rows = model.tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise CheckpointError(
            f"{path} has {len(tokens)} tokens and embeddings of {rows}; fetch another conversion of the model"
        )
    special = _special(model, len(tokens))
    whole = {i: kind == CONTROL for i, kind in enumerate(types[: len(tokens)]) if kind in (CONTROL, _USER_DEFINED)}  # fmt: skip
    whole |= dict.fromkeys(special.values(), True)
    _check_merges(path, tokens, said.get("tokenizer.ggml.merges"))
    return Vocabulary(tokens, special, dict(sorted(whole.items())))


def token_id(model: GgufFile, name: str) -> int | None:
    """The id that the file calls bos, eos, …; raises CheckpointError for what is no number."""
    key = f"tokenizer.ggml.{name}_token_id"
    found = model.metadata.get(key)
    if found is None:
        return _usual(model.metadata, name)
    if type(found) is int:
        return found
    raise CheckpointError(f"{model.path}: {key} is {found!r:.60}, not a whole number")


def _usual(said: Mapping[str, Any], name: str) -> int | None:
    """The id that llama.cpp takes where the file names none."""
    i, kind = _USUAL.get(name, (None, None))
    types = said.get("tokenizer.ggml.token_type")
    if i is None or said.get("tokenizer.ggml.model") != "llama" or not isinstance(types, list):
        return None
    return i if i < len(types) and types[i] == kind else None


def _special(model: GgufFile, count: int) -> dict[str, int]:
    found = {name: token_id(model, name) for name in _SPECIAL}
    for name, i in found.items():
        if i is not None and not 0 <= i < count:
            raise CheckpointError(
                f"{model.path}: tokenizer.ggml.{name}_token_id is {i}, and its {count} tokens end at {count - 1}; "
                "fetch another conversion of the model"
            )
    return {name: i for name, i in found.items() if i is not None}


def _check_list(path: Path, name: str, values: Any, kind: type, least: int) -> None:
    fits = isinstance(values, list) and len(values) >= least
    if not fits or not all(type(v) is kind for v in values):
        what = "texts" if kind is str else f"{least} whole numbers, one for each token"
        raise CheckpointError(
            f"{path}: tokenizer.ggml.{name} is no list of {what}; fetch it again, or another conversion"
        )


def _refuse_doubles(path: Path, tokens: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if first.setdefault(text, i) != i:
            raise CheckpointError(
                f"{path}: token {text!r:.60} is there twice, as {first[text]} and {i}; fetch another conversion of the model"
            )


def _check_merges(path: Path, tokens: Sequence[str], merges: Any) -> None:
    """Every merge is of two tokens and makes a third, spelled as the file or transformers does."""
    if not merges:
        return
    _check_list(path, "merges", merges, str, 1)
    known = {*tokens, *(_spelled(text) for text in tokens)}
    known |= {"▁" * len(text) for text in tokens if not text.strip(" ")}  # transformers, Gemma
    for merge in merges:
        parts = merge.split(" ")
        absent = [t for t in (*parts, "".join(parts)) if t not in known]
        if len(parts) != 2 or absent:
            why = f"{absent[0]!r:.60} is no token" if len(parts) == 2 else "it has not two parts"
            raise CheckpointError(
                f"{path}: the tokenizer's merge {merge!r:.60} cannot be made, {why}; fetch another conversion of the model"
            )


def _spelled(text: str) -> str:
    """A token in GPT-2's alphabet, where it is not in it already."""
    spelling, alphabet = _alphabet()
    return text if alphabet.issuperset(text) else "".join(spelling[b] for b in text.encode())


@cache
def _alphabet() -> tuple[Mapping[int, str], frozenset[str]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling: dict[int, str] = bytes_to_unicode()
    return spelling, frozenset(spelling.values())
