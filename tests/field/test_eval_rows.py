"""What ``eval`` leaves out of a text is counted: on the screen, in the report, and as a warning
that ``--quiet`` and ``--json`` keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_kit import llmquant_command
from tiny_models import EXAMPLE

PART = (EXAMPLE / "heldout.txt").read_text(encoding="utf-8")
GOOD = [json.dumps({"text": PART[i : i + 200]}) for i in range(0, 2000, 200)]


@pytest.mark.parametrize(
    ("bad", "reason", "protocol"),
    [
        pytest.param('{"text": null}', "null", "ppl/gptq", id="null"),
        pytest.param('{"text": null}', "null", "ppl/strided", id="null, strided"),
        pytest.param('{"other": "x"}', "missing field", "ppl/word", id="another field"),
        pytest.param('{"text": 7}', "neither text nor chat", "ppl/gptq", id="a number"),
        pytest.param('["x"]', "not an object", "ppl/word", id="a list"),
        pytest.param('{"text": "\\ud800"}', "not Unicode", "ppl/gptq", id="half a character"),
    ],
)
def test_dropped_rows_are_counted(bad: str, reason: str, protocol: str, tmp_path: Path) -> None:
    text, output = tmp_path / "rows.jsonl", tmp_path / "report.json"
    text.write_text("\n".join([*GOOD, *[bad] * 90]), encoding="utf-8")
    ran = llmquant_command(
        "eval", EXAMPLE, "--text", f"jsonl:{text}#text", "--protocol", protocol, "--window", 32,
        "--max-windows", 2, "--no-cost", "--output", output,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    told = f"10 of 100 rows used; dropped: 90 {reason}"
    assert told in " ".join(ran.out.split())
    assert f"warning: jsonl:{text}#text: {told}" in ran.err
    assert json.loads(output.read_text())["text"]["rows"] == {
        "read": 100, "used": 10, "empty": 0, "dropped": {reason: 90},
    }  # fmt: skip


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_the_warning_stays_when_progress_goes(option: str, tmp_path: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join([*GOOD, '{"text": null}', '{"text": ""}']), encoding="utf-8")
    ran = llmquant_command("eval", EXAMPLE, "--text", text, "--window", 32, "--no-cost", option)
    assert ran.code == 0
    assert "11 of 12 rows used; dropped: 1 null" in ran.err


def test_nothing_is_said_where_nothing_was_lost(tmp_path: Path) -> None:
    text, output = tmp_path / "rows.jsonl", tmp_path / "report.json"
    text.write_text("\n".join(GOOD), encoding="utf-8")
    ran = llmquant_command(
        "eval", EXAMPLE, "--text", text, "--window", 32, "--no-cost", "--output", output
    )
    assert (ran.code, "dropped" in ran.out + ran.err) == (0, False)
    assert json.loads(output.read_text())["text"]["rows"] == {
        "read": 10, "used": 10, "empty": 0, "dropped": {},
    }  # fmt: skip
