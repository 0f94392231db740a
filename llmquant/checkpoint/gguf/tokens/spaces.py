"""The space in front of a text in a sentencepiece tokenizer.json, as llama.cpp has it.

llama.cpp puts one in front of every text, also one that begins with spaces, and behind every
special token, unless ``tokenizer.ggml.add_space_prefix`` is false (llama-vocab.cpp). So did the
library that the vocabulary was learned with. transformers' class for Llamas puts none in front of
a space, nor behind a special token, where a prompt's first word then is another token.
"""

from __future__ import annotations

from typing import Any

_SPACE = "▁"  # sentencepiece's spelling


def with_spaces(data: dict[str, Any], *, in_front: bool) -> dict[str, Any]:
    """tokenizer.json of sentencepiece with or without the space in front of a text."""
    return _prefixed(data) if in_front else _without_prefix(data)


def _prefixed(data: dict[str, Any]) -> dict[str, Any]:
    """With a normalizer that puts it in front of every piece between whole tokens, where
    ``Metaspace`` would do so at the start of a text alone."""
    split = _parts(data["pre_tokenizer"], "pretokenizers")
    first = [p for p in split if p["type"] == "Metaspace" and p["prepend_scheme"] != "never"]
    if not first or any(p["type"] != "Metaspace" or p["split"] for p in split):
        return data
    before = [
        *_parts(data["normalizer"], "normalizers"),
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    return {**data, "normalizer": _whole(before, "normalizers"), "pre_tokenizer": None}


def _without_prefix(data: dict[str, Any]) -> dict[str, Any]:
    before = _parts(data["normalizer"], "normalizers")
    split = _parts(data["pre_tokenizer"], "pretokenizers")
    after = _parts(data["decoder"], "decoders")
    never = [{**p, "prepend_scheme": "never"} if p["type"] == "Metaspace" else p for p in split]
    return {
        **data,
        "normalizer": _whole([p for p in before if p["type"] != "Prepend"], "normalizers"),
        "pre_tokenizer": _whole(never, "pretokenizers"),
        "decoder": _whole([p for p in after if p["type"] != "Strip"], "decoders"),
    }


def _parts(found: Any, key: str) -> list[Any]:
    if not found:
        return []
    return list(found[key]) if found["type"] == "Sequence" else [found]


def _whole(found: list[Any], key: str) -> Any:
    return {"type": "Sequence", key: found} if len(found) > 1 else next(iter(found), None)
