"""No code comes from a model folder, in any command: it is not run, nobody is asked whether it
should be, and ``--json`` keeps stdout clean."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_models import save

# Several commands in one process: torch is imported once.
COMMANDS = """
import contextlib, io, json, sys
from llmquant.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = ["llmquant", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as e:
            code = e.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
TEXT = ["--calibration", "file:{text}"]
RTN = ["--method", "rtn", "--group-size", "16"]
KINDS = {
    "quantize": ["quantize", "{foreign}", "-o", "{out}", *RTN],
    "quantize as JSON": ["quantize", "{foreign}", "-o", "{out}", *RTN, "--json"],
    "quantize to a size": [
        "quantize",
        "{foreign}",
        "-o",
        "{out}",
        "--method",
        "rtn",
        "--target-bpw",
        "4.5",
        *TEXT,
    ],
    "plan": ["plan", "{foreign}", *RTN],
    "plan as JSON": ["plan", "{foreign}", *RTN, "--json"],
    "allocate": ["allocate", "{foreign}", "--target-bpw", "4.5", "-o", "{out}.yaml", *TEXT],
    "inspect": ["inspect", "{foreign}"],
    "inspect as JSON": ["inspect", "{foreign}", "--json"],
    "convert": ["convert", "{packed}", "--to", "dense", "-o", "{out}", "--json"],
    "convert to GGUF": ["convert", "{packed}", "--to", "gguf", "-o", "{out}.gguf"],
    "generate": ["generate", "{foreign}", "Hello", "--json"],
    "generate, packed": ["generate", "{packed}", "Hello"],
    "chat": ["chat", "{foreign}"],
    "serve": ["serve", "{foreign}", "--port", "0"],
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def made_foreign(folder: Path) -> Path:
    """A model whose type only its own code knows; the code leaves a file behind when it is run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "foreign"
    config["architectures"] = ["ForeignForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "foreign.Config",
        "AutoModelForCausalLM": "foreign.Model",
        "AutoTokenizer": ["foreign.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "foreign.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import llmquant

    root = tmp_path_factory.mktemp("foreign")
    model = save("llama", root / "model")
    recipe = llmquant.Recipe().updated({"method": "rtn", "weights.group_size": 16})
    llmquant.quantize(model, root / "packed", recipe)
    foreign = made_foreign(Path(shutil.copytree(model, root / "foreign")))
    (root / "text.txt").write_text("one two three " * 200, encoding="utf-8")
    text = root / "text.txt"
    return {
        "text": text,
        "foreign": foreign,
        "packed": made_foreign(root / "packed"),
        "out": root / "out",
    }


@pytest.fixture(scope="module", params=["stdin closed", "at a terminal"])
def ended(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[str, Ended]:
    """What each command ended with, by its kind."""
    commands = [[word.format(**folders) for word in words] for words in KINDS.values()]
    terminal, keyboard = pty.openpty() if request.param == "at a terminal" else (None, None)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        stdin=subprocess.DEVNULL if keyboard is None else keyboard,
        capture_output=True, text=True, check=True, timeout=300,
        preexec_fn=None if keyboard is not None else lambda: os.close(0),
    )  # fmt: skip
    for end in filter(None, (terminal, keyboard)):
        os.close(end)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return {kind: Ended(*json.loads(line)) for kind, line in zip(KINDS, lines, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_foreign_code_is_an_error_and_not_a_question(
    kind: str, ended: dict[str, Ended], folders: dict[str, Path]
) -> None:
    code, out, err = ended[kind]
    assert code in (1, 2), err
    assert err.startswith("error: "), err
    assert "Traceback" not in err
    assert "[y/N]" not in err
    if "inspect" in kind:  # says what the headers tell before it says that nothing can load it
        assert "foreign" in out
        if "JSON" in kind:
            assert json.loads(out)["model_type"] == "foreign"
    else:
        assert out == ""
    assert "foreign" in err
    assert not any((folders[name] / "ran").exists() for name in ("foreign", "packed"))
    assert not any(folders["out"].parent.glob("out*"))
