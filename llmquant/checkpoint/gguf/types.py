"""Whether what is read of a GGUF file's metadata, beside its architecture's own keys
(:mod:`.stated`), is of the type that llama.cpp writes: a text, a flag, a number. In a damaged file
it may be anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmquant.errors import CheckpointError


def refuse_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a value of another type, naming its key."""
    for key, value in metadata.items():
        for named, what, right in _TYPES:
            if named.fullmatch(key) and not right(value):
                raise CheckpointError(
                    f"{path}: {key} is {value!r:.60}, not {what}; fetch it again, or another conversion"
                )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_power(value: object) -> bool:
    return type(value) is int and value > 0 and not value & (value - 1)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


_TYPES: tuple[tuple[re.Pattern[str], str, Callable[[object], bool]], ...] = (
    (re.compile(r"general\.(architecture|type|name)"), "a text", _is_text),
    (re.compile(r"tokenizer\.(ggml\.(model|pre)|chat_template(\..+)?)"), "a text", _is_text),
    (re.compile(r"tokenizer\.ggml\.add_(bos_token|eos_token|space_prefix)"), "true or false", _is_flag),
    (re.compile(r"split\.(no|count|tensors\.count)"), "a whole number", _is_count),
    (re.compile(r"general\.alignment"), "a power of two", _is_power),
    (re.compile(r"general\.sampling\.(temp|top_k|top_p|min_p)"), "a number", _is_number),
)  # fmt: skip
