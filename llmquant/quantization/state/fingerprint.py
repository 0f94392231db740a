"""What a run is: everything that its bytes depend on, as flat facts, so that two runs can be told
apart and the difference named.

The model's files are not read whole for this, which would take as long as reading the model. Of
each weight file it notes size, time of change, its header, and 64 pages spread over its length:
another fine-tune of the same shapes differs in nearly every page, and an edit of a single tensor
changes the time. config.json, tokenizer and the like are noted whole.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.companions.files import companions
from llmquant.checkpoint.manifest import versions
from llmquant.checkpoint.reader import CheckpointReader, sha256_file
from llmquant.data.calibration import Calibration
from llmquant.models.reading.stored_dtype import StoredReader
from llmquant.recipe import Recipe

Facts = dict[str, str]
_PAGES, _PAGE = 64, 4096
_SHOWN = 6


def fingerprint(
    reader: CheckpointReader,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    dtype: torch.dtype,
    max_shard_size: int,
) -> Facts:
    """The facts of a run, named as a user would name them."""
    facts = run_facts(reader, recipe, calibration, device, dtype)
    return facts | {"--max-shard-size": str(max_shard_size)}


def run_facts(
    reader: CheckpointReader,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Facts:
    """What the numbers of a run depend on, however they are stored."""
    facts = {f"recipe {name}": value for name, value in flat(recipe.model_dump(mode="json"))}
    facts |= model_facts(reader, "the model")
    facts["calibration token ids"] = "none" if calibration is None else calibration.sha256
    facts |= {
        "--device": str(device),
        "--dtype": str(dtype).removeprefix("torch."),
        "--store-dtype": str(reader.dtype) if isinstance(reader, StoredReader) else "the model's",
    }
    return facts | machine_facts(device)


def model_facts(reader: CheckpointReader, called: str) -> Facts:
    """What identifies a model's files; ``called`` as ``the model``."""
    facts = {}
    for name in ("config.json", *companions(reader.path).carried):
        facts[f"{name} of {called}"] = sha256_file(reader.path / name)
    for path in reader.files():
        facts |= {f"{path.name} of {called}, {what}": value for what, value in _weight_file(path)}
    return facts


def machine_facts(device: torch.device) -> Facts:
    """What the last bits of sums depend on."""
    facts = {"threads": str(torch.get_num_threads()), "processor": _processor(device)}
    return facts | {f"version of {name}": version for name, version in versions().items()}


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values, as text."""
    if isinstance(value, Mapping) and value:
        return [
            pair for k, v in value.items() for pair in flat(v, f"{path}.{k}" if path else str(k))
        ]
    return [(path, str(value))]


def _weight_file(path: Path) -> list[tuple[str, str]]:
    status = path.stat()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = hashlib.sha256(file.read(length)).hexdigest()
        pages = hashlib.sha256()
        for i in range(_PAGES):
            file.seek((status.st_size - _PAGE) * i // (_PAGES - 1) if status.st_size > _PAGE else 0)
            pages.update(file.read(_PAGE))
    changed = datetime.fromtimestamp(status.st_mtime_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return [
        ("size", str(status.st_size)),
        ("changed at", f"{changed}.{status.st_mtime_ns % 10**9:09d}"),
        ("header", header),
        ("content", pages.hexdigest()),
    ]


def _processor(device: torch.device) -> str:
    """What kernels are chosen by: sums are ordered otherwise with other vector widths."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    mkl = os.environ.get("MKL_CBWR", "")
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {mkl}".strip()


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, as words: ``recipe weights.bits was 4 and is 3; …``; empty when nothing
    does."""
    names = [n for n in [*then, *(n for n in now if n not in then)] if then.get(n) != now.get(n)]
    parts = [
        f"{n} was {_short(then.get(n, 'absent'))} and is {_short(now.get(n, 'absent'))}"
        for n in names[:_SHOWN]
    ]
    return "; ".join(parts) + (f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _short(value: str) -> str:
    """A digest by its first digits."""
    is_digest = len(value) == 64 and not set(value) - set("0123456789abcdef")
    return f"{value[:8]}…" if is_digest else value
