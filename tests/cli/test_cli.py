"""The command line as a user meets it: exit codes, one JSON object, quiet, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = "examples/tiny-llama"
HELDOUT = f"file:{TINY}/heldout.txt"


def llmquant(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from llmquant.cli import main; main()", *args]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        pytest.param(["quantize", TINY, "-o", "{out}"], 2, "--calibration", id="gptq without text"),
        pytest.param(["quantize", "no/such", "-o", "{out}", "--method", "rtn"], 1, "no/such", id="model not found"),
        pytest.param(["quantize", TINY, "-o", "{out}", "--method", "magic"], 2, "magic", id="unknown method"),
        pytest.param(["quantize", TINY, "-o", "{out}", "--recipe", "nope"], 2, "gptq-w4g128", id="unknown recipe"),
        pytest.param(["quantize", TINY, "-o", "{out}", "--method", "rtn", "--bits", "5"], 2, "2, 3, 4, 8", id="bits"),
        pytest.param(
            ["quantize", TINY, "-o", "{out}", "--method", "rtn", "--group-size", "100"], 2, "sizes that do", id="group"
        ),
        pytest.param(["quantize", TINY, "-o", TINY, "--method", "rtn"], 2, "already exists", id="output is the model"),
        pytest.param(["quantize", TINY, "-o", "{out}", "--method", "rtn", "--device", "tpu9"], 2, "tpu9", id="device"),
        pytest.param(["quantize", TINY, "-o", "{out}", "--calibration", "file:nope.txt"], 2, "nope.txt", id="no text"),
        pytest.param(["inspect", "examples"], 1, "config.json", id="inspect a plain folder"),
        pytest.param(["inspect", TINY, "--verify"], 1, "manifest", id="verify without a manifest"),
        pytest.param(["generate", TINY, " "], 2, "prompt is empty", id="empty prompt"),
        pytest.param(["generate", TINY, "x", "--kernel", "nope"], 2, "nope", id="kernel"),
        pytest.param(["convert", TINY, "--to", "gptq", "-o", "{out}"], 2, "not quantized", id="convert a dense model"),
        pytest.param(["plan", TINY, "--format", "nope"], 2, "choose one of", id="plan for no format"),
        pytest.param(["eval", TINY, "--text", "file:nope.txt", "--no-cost"], 2, "nope.txt", id="eval without text"),
        pytest.param(["nonsense"], 2, "nonsense", id="no such command"),
    ],
)
def test_bad_input_gets_a_clear_error(args: list[str], code: int, words: str, tmp_path: Path) -> None:
    ran = llmquant(*(a.format(out=tmp_path / "out") for a in args))
    assert ran.returncode == code, ran.stderr
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert not list(tmp_path.iterdir())


def test_the_main_job(tmp_path: Path) -> None:
    out = str(tmp_path / "w4")
    ran = llmquant("quantize", TINY, "-o", out, "--recipe", "rtn-w4g128", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["bits_per_weight"] == 4.125
    assert json.loads(llmquant("inspect", out, "--verify", "--json").stdout)["verified"] is True
    reply = json.loads(llmquant("generate", out, "Hello", "--max-new-tokens", "5", "--json").stdout)
    assert 1 <= reply["new_tokens"] <= 5
    ran = llmquant(
        "eval", out, "--reference", TINY, "--text", HELDOUT, "--window", "128", "--max-windows", "4", "--no-cost", "--json"
    )
    assert ran.returncode == 0, ran.stderr
    assert {m["role"] for m in json.loads(ran.stdout)["models"]} == {"reference", "candidate"}


def test_quiet_is_quiet(tmp_path: Path) -> None:
    ran = llmquant("quantize", TINY, "-o", str(tmp_path / "q"), "--recipe", "rtn-w4g128", "--quiet")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_recipes_are_listed() -> None:
    listed = json.loads(llmquant("recipes", "--json").stdout)
    assert {"rtn-w4g128", "gptq-w4g128", "gptq-w4g64-asym", "gptq-w8", "gptq-w3g32"} <= listed.keys()
