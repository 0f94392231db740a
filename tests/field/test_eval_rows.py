"""What ``eval`` leaves out of a text is counted: on the screen, in the report, and as a warning
that ``--quiet`` and ``--json`` keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
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
    lost = f"jsonl:{text}#text: 10 of 100 rows used; dropped: 90 {reason}"
    assert f"Not all of the text: {lost}." in " ".join(ran.out.split())
    assert f"warning: {lost}" in ran.err
    assert json.loads(output.read_text())["text"]["rows"] == {
        "read": 100, "used": 10, "empty": 0, "dropped": {reason: 90}, "partly": {},
    }  # fmt: skip


BROKEN = {
    "a number of thousands of digits": ('{"text": ' + "9" * 6000 + "}", "is not JSON"),
    "brackets": ("[" * 100_000, "is not JSON"),
    "cut": ('{"text": "abc', "is not JSON"),
    "another encoding": ('{"text": "é"}'.encode("utf-16").decode("latin-1"), "11 is not JSON"),
}


@pytest.mark.parametrize("command", ["eval", "quantize"])
@pytest.mark.parametrize(("line", "words"), BROKEN.values(), ids=list(BROKEN))
def test_a_line_that_cannot_be_read_is_named(
    line: str, words: str, command: str, tmp_path: Path
) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join([*GOOD, line]), encoding="utf-8")
    options = {
        "eval": ("--text", text, "--window", 32, "--no-cost"),
        "quantize": (
            "-o",
            tmp_path / "q",
            "--group-size",
            32,
            "--calibration",
            f"jsonl:{text}#text",
        ),
    }
    ran = llmquant_command(command, EXAMPLE, *options[command])
    assert (ran.code, f"{text}:11" in ran.err, words in ran.err) == (2, True, True), ran.err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "data", ["9" * 6000, "[" * 100_000, "{", "[]"], ids=["digits", "brackets", "cut", "list"]
)
def test_a_report_that_cannot_be_read_is_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(data, encoding="utf-8")
    ran = llmquant_command("leaderboard", tmp_path)
    assert (ran.code, "report.json" in ran.err) == (2, True), ran.err


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
        "read": 10, "used": 10, "empty": 0, "dropped": {}, "partly": {},
    }  # fmt: skip


def test_a_suite_and_a_leaderboard_say_it_too(tmp_path: Path) -> None:
    text, suite, board = (tmp_path / name for name in ("rows.jsonl", "suite.yaml", "BOARD.md"))
    text.write_text("\n".join([*GOOD, '{"text": null}']), encoding="utf-8")
    keys = {
        "models": [{"label": "tiny", "model": str(EXAMPLE)}],
        "texts": [{"name": "rows", "source": str(text), "max_windows": 2}],
        "protocols": ["ppl/gptq-32"],
        "cost": False,
    }
    suite.write_text(yaml.safe_dump(keys), encoding="utf-8")
    results = tmp_path / "results"
    ran = llmquant_command(
        "eval", "--suite", suite, "--cache", tmp_path / "cache", "--output", results, "--quiet"
    )
    assert ran.code == 0, ran.err
    lost = "10 of 11 rows used; dropped: 1 null"
    assert (lost in ran.said, f"warning: {text}: {lost}" in ran.err) == (True, True)
    assert llmquant_command("leaderboard", results, "--markdown", board).code == 0
    assert lost in board.read_text(encoding="utf-8")
