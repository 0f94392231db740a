"""A finished training run, for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.cli.screen import fact_table, screen


def show_trained(facts: Mapping[str, Any]) -> None:
    """What came of it, for people."""
    qat = facts["qat"]
    change = 1 - qat["after"] / qat["before"] if qat["before"] else 0.0
    rows = [
        (
            "trained",
            f"{qat['options']['size']} of {facts['modules']} linears" + _norms(qat["norms"]),
        ),
        (
            "held-out KL",
            f"{qat['before']:.5f} → {qat['after']:.5f} nats a token ({change:.0%} less), kept from step {qat['step']} "
            f"of {qat['steps']}",
        ),
        *_codes(qat),
        ("text", f"{qat['windows']} windows, {qat['tokens']:,} tokens; {qat['heldout']} held out"),
        (
            "size",
            f"{facts['bytes_written'] / 1e6:,.2f} MB; {facts['bits_per_weight']:.3f} bits per quantized weight",
        ),
        ("computed", facts["computed"]),
        ("proved", "every linear re-read from disk and equal to what was trained"),
    ]
    if "seconds" in facts:
        rows.append(("time", f"{facts['seconds']:.1f} s"))
    console = screen()
    console.print(str(facts["path"]))
    console.print(fact_table(rows))


def _codes(qat: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row about the codes, where they were trained."""
    if qat["options"]["size"] == "scales":
        return []
    share = qat["codes_changed"] / max(qat["codes"], 1)
    return [("codes", f"{qat['codes_changed']:,} of {qat['codes']:,} changed ({share:.2%})")]


def _norms(count: int) -> str:
    return f" and {count} norms" if count else ""
