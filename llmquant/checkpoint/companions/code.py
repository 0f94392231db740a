"""A folder's own Python code: carried along as text, never run. Here is only what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant.checkpoint.companions.files import SHOWN, Companions


def own_code(folder: Path, found: Companions) -> list[str]:
    """Sentences on a folder's own code: what is copied, and what ``auto_map`` names in vain."""
    code = [n for n in found.carried if n.endswith(".py")]
    said = []
    if code:
        said.append(
            f"copied, but not run: {', '.join(code[:SHOWN])}; engines run such code only where they are told to trust it"
        )
    for name in (
        "config.json",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        missing = sorted(m for m in _modules(folder / name) if f"{m}.py" not in code)
        if missing:
            said.append(
                f"auto_map in {name} names {missing[0]}.py, which the model folder does not have"
            )
    return said


def _modules(config: Path) -> set[str]:
    """Modules of its own folder that a config's ``auto_map`` names; those of other repositories
    have ``--`` in their names."""
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()  # who needs the file says what is wrong with it
    places: list[Any] = [value.get("auto_map")] if isinstance(value, dict) else []
    names: set[str] = set()
    while places:
        place = places.pop()
        if isinstance(place, dict):
            places += place.values()
        elif isinstance(place, list):
            places += place
        elif isinstance(place, str) and "--" not in place and "." in place:
            names.add(place.rpartition(".")[0].replace(".", "/"))
    return names
