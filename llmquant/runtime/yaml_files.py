"""YAML files that people write: YAML 1.2, in which ``off`` and ``yes`` are words, and no key
twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llmquant.errors import UsageError


def read_yaml(path: Path) -> Any:
    """What a file says; None if it is empty.

    Raises:
        UsageError: it cannot be read, is no YAML, or gives a key twice; says where.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError, ValueError) as e:
        raise UsageError(f"{path} cannot be read as YAML: {_said(e)}") from e


def _said(error: Exception) -> str:
    """What is wrong and where; ruamel adds advice on how to allow it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
