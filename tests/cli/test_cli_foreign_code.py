"""No code comes from a model folder, in any command: it is not run, nobody is asked whether it
should be, and ``--json`` keeps stdout clean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from children import Ended, make_foreign, run_commands
from tiny_models import save

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import llmquant

    root = tmp_path_factory.mktemp("foreign")
    model = save("llama", root / "model")
    recipe = llmquant.Recipe().updated({"method": "rtn", "weights.group_size": 16})
    llmquant.quantize(model, root / "packed", recipe)
    foreign = make_foreign(Path(shutil.copytree(model, root / "foreign")))
    (root / "text.txt").write_text("one two three " * 200, encoding="utf-8")
    text = root / "text.txt"
    return {
        "text": text,
        "foreign": foreign,
        "packed": make_foreign(root / "packed"),
        "out": root / "out",
    }


@pytest.fixture(scope="module", params=["stdin closed", "at a terminal"])
def ended(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[str, Ended]:
    """What each command ended with, by its kind."""
    commands = [[word.format(**folders) for word in words] for words in KINDS.values()]
    done = run_commands(commands, at_terminal=request.param == "at a terminal")
    return dict(zip(KINDS, done, strict=True))


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
