"""Words of reports."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 thread``, ``1,200 windows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
