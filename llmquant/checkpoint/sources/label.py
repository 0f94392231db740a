"""Where a config says how its weights are stored: ``quantization_config`` or its older name
``compression_config``, of the whole or of a multimodal model's text part; and ``dtype`` or its
older name ``torch_dtype``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KEYS = ("quantization_config", "compression_config")
_TEXT = "text_config"


def labels(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every label that says something, under its key; the first is the one that counts."""
    text = config.get(_TEXT)
    for place in (config, text if isinstance(text, dict) else {}):
        for key in KEYS:
            if place.get(key):
                yield key, place[key]


def named_dtypes(config: Mapping[str, Any]) -> Iterator[str]:
    """Every dtype that the config names, the whole's before its text part's. Some have a dtype for
    each part there (an object) or nonsense, which names none."""
    text = config.get(_TEXT)
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(place.get(key), str):
                yield place[key]


def without_label(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as that of an unquantized model, its keys in the same order."""
    plain = {k: v for k, v in config.items() if k not in KEYS}
    if isinstance(plain.get(_TEXT), dict):
        plain[_TEXT] = {k: v for k, v in plain[_TEXT].items() if k not in KEYS}
    return plain
