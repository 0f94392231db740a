"""What the page talks to, for its top: name, scheme and method, size against the original, measured
loss, and what computes it. All from the model folder and its card; what is not known is left out.

Without the original's folder, the size is held against the same weights at 16 bits.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llmquant
from llmquant.errors import LlmquantError
from llmquant_serve.service import Service

_RECIPE = "recipe.yaml"
# Columns of the table that `llmquant eval --card` writes, and how the page says them.
_LOSSES = (("ratio", "perplexity ×{}"), ("KL nats", "KL {}"), ("top-1 %", "same top token {} %"))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the model.

    Attributes:
        rows: what it is called (``weights``) → what it is (``W4 g64 asym, GPTQ``).
        table: the measured table of the model card; None if there is none.
    """

    name: str
    rows: Mapping[str, str]
    table: str | None = None

    @property
    def html(self) -> str:
        """The top of the page."""
        rows = "".join(
            f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(said)}</dd></div>"
            for term, said in self.rows.items()
        )
        return f"<header><h1>{html.escape(self.name)}</h1><dl>{rows}</dl></header>"


def facts_of(service: Service, folder: Path, original: Path | None = None) -> Facts:
    """The facts of a served model.

    Args:
        original: the folder of the model that it was made from.
    """
    table = measured(folder)
    rows = {
        **_weights(folder, original),
        "loss": ", ".join(_loss(table or "")),
        "runs in": service.computing.partition(";")[0] or service.engine.name,
    }
    return Facts(service.model, {term: said for term, said in rows.items() if said}, table)


def measured(folder: Path) -> str | None:
    """The table that ``llmquant eval --card`` wrote into the model card; None without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, start, rest = text.partition(llmquant.MEASURED_START)
    table, end, _ = rest.partition(llmquant.MEASURED_END)
    return table.strip() if start and end and _first_table(table) else None


def _weights(folder: Path, original: Path | None) -> dict[str, str]:
    """Scheme and size; nothing of a folder that only another engine reads."""
    try:
        found = llmquant.inspect(folder)
        before = None if original is None else llmquant.inspect(original)
    except LlmquantError:
        return {}
    scheme = ", ".join(filter(None, (found.scheme, _method(folder) if found.quantized else "")))
    size = _size(found.bytes_on_disk)
    if before is not None:
        size = f"{size}, {found.bytes_on_disk / before.bytes_on_disk:.0%} of the original's {_size(before.bytes_on_disk)}"
    elif found.quantized:
        dense = 2 * found.parameters
        size = f"{size}, {found.bytes_on_disk / dense:.0%} of {_size(dense)} at 16 bits"
    return {"weights": scheme, "size": size}


def _method(folder: Path) -> str:
    """How the recipe in the folder rounds: ``AWQ + GPTQ``; empty without a recipe."""
    try:
        steps = llmquant.load_recipe(folder / _RECIPE).steps
    except LlmquantError:
        return ""
    return " + ".join(s if s == "tune" else s.upper() for s in steps.split("+"))


def _loss(table: str) -> list[str]:
    """The measured losses of the model, which is the last row of the first table."""
    rows = _first_table(table)
    if len(rows) < 3:
        return []
    cells = dict(zip(rows[0], rows[-1], strict=False))
    numbers = {name: cells.get(name, "").partition(" ")[0] for name, _ in _LOSSES}
    return [said.format(numbers[name]) for name, said in _LOSSES if numbers[name][:1].isdigit()]


def _first_table(text: str) -> list[list[str]]:
    """Cells of the first Markdown table, its header and rule included."""
    found = re.search(r"(?:^\|.*\|[ \t]*(?:\n|\Z))+", text, re.MULTILINE)
    lines = found[0].splitlines() if found else []
    return [[c.strip() for c in re.split(r"(?<!\\)\|", x.strip())[1:-1]] for x in lines]


def _size(nbytes: float) -> str:
    """Decimal units, as the model's files are listed elsewhere."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 999.5e6 else f"{nbytes / 1e6:.3g} MB"
