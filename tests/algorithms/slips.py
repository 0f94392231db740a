"""A module with one slip in it: what a twin must notice."""

from __future__ import annotations

import inspect
import sys
import types

import pytest


def slipped(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, right: str, wrong: str
) -> types.ModuleType:
    """``module`` with one piece of its source replaced, beside the real one."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"the slip {right!r} no longer fits the source"
    found = types.ModuleType(f"slipped_{module.__name__.rpartition('.')[2]}")
    monkeypatch.setitem(sys.modules, found.__name__, found)  # dataclasses look their module up
    exec(compile(source.replace(right, wrong), found.__name__, "exec"), found.__dict__)
    return found
