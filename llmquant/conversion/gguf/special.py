"""Ids of special tokens for a GGUF file, from a model's folder.

They are named by texts in tokenizer_config.json, else by numbers in generation_config.json or
config.json. A file that names no eos is not a model without one: llama.cpp takes token 11 then, a
comma or the like. Further tokens that end a turn become ``eot`` and ``eom``, at which llama.cpp
ends as it does at eos, unless it knows them by name anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmquant.checkpoint.gguf.config import ENDS
from llmquant.checkpoint.reader import read_json
from llmquant.errors import LayoutError

_FURTHER_ENDS = ("eot", "eom")


def special_ids(
    folder: Path, settings: Mapping[str, Any], tokens: Sequence[str], added: Collection[int]
) -> dict[str, int]:
    """Ids of special tokens, by what llama.cpp calls them: ``bos`` → 1.

    Args:
        folder: of the model.
        settings: its tokenizer_config.json.
        tokens: texts by id.
        added: ids of those that stand for themselves wherever a text holds them.

    Raises:
        LayoutError: more of them than a file has places for.
    """
    by_text = {text: i for i, text in enumerate(tokens)}
    found: dict[str, int] = {}
    ends: list[int] = []
    for key in ("bos", "eos", "pad", "unk"):
        numbers = _numbers(folder, f"{key}_token_id", len(tokens))
        text = _content(settings.get(f"{key}_token"))
        named = by_text[text] if text in by_text else next(iter(numbers), None)
        if named is not None:
            found[key] = named
        if key == "eos":
            # An ordinary token is what a config class has by default, and nobody looked at.
            ends = [i for i in numbers if i != named and i in added and tokens[i] not in ENDS]
    if len(ends) > len(_FURTHER_ENDS):
        raise LayoutError(
            f"{folder}: a turn ends at {', '.join(repr(tokens[i]) for i in ends)} too (eos_token_id), and a GGUF file has "
            f"places for {len(_FURTHER_ENDS)} of these; leave some out of generation_config.json"
        )
    return found | dict(zip(_FURTHER_ENDS, ends, strict=False))


def _numbers(folder: Path, key: str, count: int) -> list[int]:
    """The ids below ``count`` that generation_config.json, else config.json, has under a key."""
    files = (read_if_there(folder / name) for name in ("generation_config.json", "config.json"))
    said: Any = next((value for file in files if (value := file.get(key)) is not None), [])
    listed = said if isinstance(said, list) else [said]
    return [i for i in listed if type(i) is int and 0 <= i < count]


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    return dict(read_json(path)) if path.is_file() else {}


def _content(token: object) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with one."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None
