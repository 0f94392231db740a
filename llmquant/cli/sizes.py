"""Sizes as people write them: ``8GB``, ``1.5 GiB``, ``800M``, or plain bytes."""

from __future__ import annotations

import re

from llmquant.errors import UsageError

_UNITS = {"": 1, **{f"{p}{suffix}": 1000**i for i, p in enumerate("KMGT", 1) for suffix in ("", "B")}}
_UNITS |= {"B": 1, **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(option: str, text: str) -> int:
    """Bytes.

    Raises:
        UsageError: not a size; names the option.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{option} {text!r} is no size; write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
