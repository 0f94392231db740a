"""compressed-tensors' ``config_groups``: which group of the config speaks for a module."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from llmquant.errors import FormatError
from llmquant.formats.base import HEADS, is_embedding, is_expert

_EXPERTS = r"re:(.*\.)?experts\.\d+\..*"


def groups_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of ``config_groups``.

    Raises:
        FormatError: they are no mappings.
    """
    groups = config.get("config_groups") or {}
    found = list(groups.values()) if isinstance(groups, dict) else [groups]
    if not all(isinstance(g, dict) and isinstance(g.get("targets"), list) for g in found):
        raise FormatError(
            "the config's config_groups is no mapping of names to groups with targets"
        )
    return found


def priority(target: str, module: str) -> int | None:
    """compressed-tensors' order of matching: exact name, then regular expression, then class name;
    None is no match."""
    if target == module:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if re.match(target[3:], module) else None
        except re.error as e:
            raise FormatError(
                f"the config has the target {target!r}, which is no regular expression: {e}"
            ) from e
    return 2 if target == ("Embedding" if is_embedding(module) else "Linear") else None


def group_of(module: str, groups: Collection[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group that targets a module most specifically.

    Raises:
        FormatError: none does.
    """
    ranked = [
        (rank, i, group)
        for i, group in enumerate(groups)
        for target in group.get("targets", [])
        if (rank := priority(target, module)) is not None
    ]
    if not ranked:
        raise FormatError(f"{module} has quantized weights but no config group targets it")
    return min(ranked, key=lambda r: r[:2])[2]


def experts_apart(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The groups with all experts in one of its own that finds them by a pattern, where they have
    one scheme and other linears another: transformers takes such a group for all experts, and for
    want of it the first one, whatever that says."""
    kinds = {key: [t for t in group["targets"] if is_expert(t)] for key, group in groups.items()}
    having = [key for key, experts in kinds.items() if experts]
    if len(groups) == 1 or len(having) != 1:
        return dict(groups)
    (key,) = having
    rest = [t for t in groups[key]["targets"] if not is_expert(t)]
    others = [{**group, "targets": rest} if k == key else group for k, group in groups.items()]
    found = [group for group in others if group["targets"]]
    found.append({**groups[key], "targets": [_EXPERTS]})
    return {f"group_{i}": group for i, group in enumerate(found)}


def ignore_list(skipped: Collection[str]) -> list[str]:
    """The config's ``ignore``: transformers calls every head ``lm_head``, whatever its checkpoint
    says, so that is named too."""
    return sorted({*skipped, *("lm_head" for name in skipped if name in HEADS)})


def ignored(ignore: Collection[str], module: str) -> bool:
    """Whether the config's ``ignore`` names the module, by name or regular expression."""
    return any(priority(pattern, module) in (0, 1) for pattern in ignore)
