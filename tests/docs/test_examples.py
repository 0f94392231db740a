"""Every script in examples/ runs as its docstring says, and so does the notebook."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quantize_and_compare.ipynb"
SECONDS = 600  # each takes seconds to a minute; on a machine that does other things, several

# Script -> words that it prints when it did what it is for.
PRINTS = {
    "add_a_format.py": "every linear came back with the same digest",
    "custom_recipe.py": "recipe kept in the folder: True",
    "evaluate_two_models.py": "gptq-w4g128: KL 0.0",
    "openai_client.py": "most likely next tokens: {",
    "quantize.py": "42 linears, 4.125 bits per weight",
}
TAKES_A_FOLDER = {"custom_recipe.py", "evaluate_two_models.py", "quantize.py"}


def ran(*command: str, cwd: Path, **variables: str) -> str:
    """Standard output of a Python command; a failure shows what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_script_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == [NOTEBOOK.name]


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_a_script_runs_and_says_what_it_found(name, tmp_path):
    folder = [str(tmp_path / "output")] if name in TAKES_A_FOLDER else []
    assert PRINTS[name] in ran(str(EXAMPLES / name), *folder, cwd=tmp_path)


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_a_script_says_what_it_does_how_to_start_it_and_how_long_it_took(name):
    told = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))) or ""
    assert f"python examples/{name}" in told
    assert "seconds on two cores" in told


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_a_script_imports_public_names_only(name):
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    froms = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imports = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    inside = [m for m in (*froms, *imports) if m.startswith("llmquant")]
    assert set(inside) == {"llmquant"}


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    runner = Path(__file__).with_name("notebook.py")
    out = ran(str(runner), str(NOTEBOOK), cwd=tmp_path, EXAMPLES=str(EXAMPLES))
    assert "GPTQ: KL 0.0" in out


def test_the_notebook_is_nbformat_4_and_stores_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in (c for c in cells if c["cell_type"] == "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
