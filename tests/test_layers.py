"""Imports point down, read from the syntax trees; importing does nothing; asking for help does not
cost torch."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmquant

ROOT = Path(__file__).parent.parent

# Lowest first. A room may import lower rows only; rooms of one row never import each other. Modules
# of one room may.
ROWS = {
    "llmquant": (
        ("errors",),
        ("spec", "bitpack", "activations", "stats", "written"),
        ("weight", "runtime", "records", "recipe_sections"),
        ("recipe", "drift"),
        ("algorithms", "formats", "kernels"),
        ("checkpoint",),
        ("data",),
        ("models",),
        ("quantization",),
        ("planning", "conversion"),
        ("training",),
        ("cli",),
        ("__main__",),
    ),
    "llmquant_eval": (
        ("report", "cli_options", "cli_progress"),
        ("models", "texts"),
        ("scoring", "speed"),
        ("tasks",),
        ("run",),
        ("suites",),
        ("leaderboard", "decide"),
        ("auto", "validate"),
        ("suite_cli",),
        ("cli",),
    ),
    "llmquant_serve": (
        ("errors",),
        ("engines",),
        ("metrics", "generation"),
        ("drift",),
        ("service",),
        ("api",),
        ("chat",),
        ("build", "server"),
        ("cli",),
    ),
}
MOST_MODULES = 12  # of a folder
# What the packages above may import beside the names of ``llmquant`` itself: the exceptions, which
# cost no torch.
PUBLIC_MODULES = {
    "llmquant.errors",
    "llmquant.cli.options",
    "llmquant.cli.progress",
    "llmquant.cli.sizes",
    "llmquant.cli.stopping",
}
PACKAGES = {
    "llmquant": ROOT / "llmquant",
    "llmquant_eval": ROOT / "eval" / "llmquant_eval",
    "llmquant_serve": ROOT / "serve" / "llmquant_serve",
}


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *(p for p in parts if p != "__init__")])


def sources(package: str) -> dict[str, Path]:
    return {module_name(package, path): path for path in sorted(PACKAGES[package].rglob("*.py"))}


MODULES = {package: sources(package) for package in PACKAGES}


def imports(path: Path, own: str) -> Iterator[str]:
    """Every module that a file imports anywhere, functions and type checking included; relative
    ones made absolute.

    ``from package import name`` counts as the module ``package.name`` where there is one, else as
    ``package``.
    """
    known = {name for modules in MODULES.values() for name in modules}
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from (
                f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names
            )


def part(module: str) -> str:
    """``llmquant.formats.gptq`` is part of ``formats``."""
    return module.split(".")[1]


LIBRARY = {name: path for name, path in MODULES["llmquant"].items() if name != "llmquant"}
ROOMED = {
    name: path for package in PACKAGES for name, path in MODULES[package].items() if name != package
}


def row(module: str) -> int:
    package, room = module.split(".")[0], part(module)
    found = [i for i, rooms in enumerate(ROWS[package]) if room in rooms]
    assert found, f"{package}/{room} is new: give it a row in this file"
    return found[0]


@pytest.mark.parametrize("name", ROOMED)
def test_imports_point_down(name):
    package = name.split(".")[0]
    for imported in imports(ROOMED[name], name):
        top = imported.split(".")[0]
        if package == "llmquant":
            assert top not in ("llmquant_eval", "llmquant_serve"), (
                f"{name} imports {imported}, which stands above the library"
            )
        if top != package:
            continue
        assert imported != package, (
            f"{name} imports the public face of its own package; import the module"
        )
        assert part(imported) == part(name) or row(imported) < row(name), (
            f"{name} (row {row(name)}) imports {imported}"
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_a_detour(package):
    modules = MODULES[package]
    below = {
        name: {i for i in imports(path, name) if i in modules and i != name}
        for name, path in modules.items()
    }
    # What a package's __init__ gathers is not an import of the package by its parts.
    order = graphlib.TopologicalSorter(
        {n: {m for m in found if not n.startswith(f"{m}.")} for n, found in below.items()}
    )
    order.prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rows_name_no_room_that_is_gone(package):
    assert {room for rooms in ROWS[package] for room in rooms} == {
        part(n) for n in MODULES[package] if n != package
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_has_too_many_modules(package):
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES[package].values())
    assert not {folder: count for folder, count in counts.items() if count > MOST_MODULES}


UPPER = {
    name: path
    for package in ("llmquant_eval", "llmquant_serve")
    for name, path in MODULES[package].items()
}


@pytest.mark.parametrize("name", UPPER)
def test_upper_packages_use_only_the_public_api(name):
    package = name.split(".")[0]
    for imported in imports(UPPER[name], name):
        top = imported.split(".")[0]
        assert top == package or not top.startswith("llmquant_"), (
            f"{name} imports {imported}, its sibling"
        )
        assert top != "llmquant" or imported in {"llmquant", *PUBLIC_MODULES}, (
            f"{name} imports {imported}, which is private"
        )
    for node in ast.walk(ast.parse(UPPER[name].read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "llmquant"
        ):
            assert node.attr in llmquant.__all__, (
                f"{name} uses llmquant.{node.attr}, which is not public"
            )
        if isinstance(node, ast.ImportFrom) and node.module == "llmquant" and not node.level:
            private = {alias.name for alias in node.names} - set(llmquant.__all__)
            assert not private, f"{name} imports {', '.join(private)}, which is not public"


def test_every_public_name_can_be_had():
    assert {"load", "quantize", "UsageError", "Events"} <= set(dir(llmquant))
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmquant.__version__)
    for name in llmquant.__all__:
        value = getattr(llmquant, name)
        assert getattr(value, "__module__", "llmquant.").startswith("llmquant."), name
    with pytest.raises(AttributeError, match="No llmquant attribute quantise"):
        _ = llmquant.quantise


def does_something(node: ast.stmt) -> bool:
    """Whether a module-level statement is more than a definition, an import or a constant."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant) and not registers_command(node.value)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'")
    return isinstance(node, ast.For | ast.While | ast.With | ast.Raise | ast.Assert | ast.Delete)


def registers_command(call: ast.expr) -> bool:
    """``app.command(...)(function)``, ``app.add_typer(...)`` and an operator's gradient: typer's
    and torch's ways of defining."""
    text = ast.unparse(call)
    return text.startswith(("app.command(", "app.add_typer(")) or ".register_autograd(" in text


EVERY = {name: path for modules in MODULES.values() for name, path in modules.items()}


@pytest.mark.parametrize("name", EVERY)
def test_importing_does_nothing(name):
    body = ast.parse(EVERY[name].read_text(encoding="utf-8")).body
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in body if does_something(node)]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "eval"), str(ROOT / "serve"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


HELP = """
import sys
sys.argv = ["llmquant", *{arguments!r}]
from llmquant.cli import main
try:
    main()
except SystemExit as e:
    code = e.code
heavy = sorted({{"torch", "transformers", "datasets", "numpy"}} & sys.modules.keys())
print("HEAVY", heavy, "CODE", code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        pytest.param(["--help"], 0, "quantize", id="--help"),
        pytest.param(["quantize", "--help"], 0, "--group-size", id="quantize --help"),
        pytest.param(["inspect", "--help"], 0, "--verify", id="inspect --help"),
        pytest.param(["eval", "--help"], 0, "--text", id="eval --help"),
        pytest.param(["auto", "--help"], 0, "--max-kl", id="auto --help"),
        pytest.param(["serve", "--help"], 0, "--engine", id="serve --help"),
        pytest.param(["chat", "--help"], 0, "--web", id="chat --help"),
        pytest.param(["monitor", "--help"], 0, "--plot", id="monitor --help"),
        pytest.param(["quantize", "--bitz", "4"], 2, "--bitz", id="a mistyped option"),
    ],
)
def test_help_and_misuse_answer_without_torch(arguments, code, told):
    result = run_python(HELP.format(arguments=arguments))
    assert f"HEAVY [] CODE {code}" in result.stdout, result.stderr
    assert told in result.stdout + result.stderr


def test_importing_the_package_does_not_import_torch():
    result = run_python(
        "import sys, llmquant, llmquant.errors, llmquant.recipe; print('torch' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stderr
