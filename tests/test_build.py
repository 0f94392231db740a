"""The build hook: compiles the CPU kernel, or says why not."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What the hook reads, without a compiled library."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "llmquant" / "kernels").mkdir(parents=True)
    return tmp_path


def test_the_library_is_built_and_has_its_instruction_sets(hook, source, monkeypatch):
    monkeypatch.setattr(hook, "FLAGS", [*hook.FLAGS, "-O0"])  # whose speed is of no interest here
    assert hook.build(source) is None
    library = ctypes.CDLL(str(source / hook.LIBRARY))
    library.llmquant_instructions.restype = ctypes.c_char_p
    names, has = [], ctypes.c_int()
    while name := library.llmquant_instructions(len(names), ctypes.byref(has)):
        names.append(name.decode())
    assert names[-1] == "generic"
    assert not list((source / "llmquant" / "kernels").glob("*.new"))


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("/nonexistent/c++", "No such file"), ("false", "exit code 1")],
    ids=["no such compiler", "it fails"],
)
def test_a_compiler_that_does_not_work_is_a_reason_and_leaves_nothing(
    hook, source, compiler, words, monkeypatch
):
    monkeypatch.setenv("CXX", compiler)
    assert words in hook.build(source)
    assert not (source / hook.LIBRARY).exists()


def test_no_compiler_says_what_to_install(hook, source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "install g++ or clang++" in hook.build(source)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is a matter of x86")
def test_the_logic_of_vectors_of_sixteen_is_right_on_any_processor(hook, tmp_path):
    """AVX-512's file compiled for what this machine has: other instructions, the same code and its
    own rows at a time."""
    cpu, check = ROOT / "csrc" / "cpu", ROOT / "tests" / "native" / "check.cpp"
    wide = tmp_path / "wide.cpp"
    text = (cpu / "isa_avx512.cpp").read_text()
    assert text.startswith("#define LANES 16")
    wide.write_text(
        re.sub(r"return __builtin_cpu_supports.*?;", "return true;", text, flags=re.DOTALL)
    )
    others = [
        cpu / f"{name}.cpp"
        for name in (
            "api",
            "products",
            "block",
            "prompt",
            "attention",
            "threads",
            "masks",
            "isa_generic",
            "isa_avx2",
        )
    ]
    program = tmp_path / "check"
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-march=native",
        "-mno-avx512f",
        f"-I{cpu}",
    ]
    subprocess.run(["c++", *flags, check, wide, *others, "-o", program, "-ldl"], check=True)
    done = subprocess.run([program, "0"], capture_output=True, text=True, check=False)
    assert done.stdout == "avx512: 504 products, 0 numbers wrong\n"


def test_a_wheel_has_every_file_of_the_packages(hook):
    """Modules, the list of public names, recipes, suites and templates; nothing of the tests."""
    from hatchling.builders.wheel import WheelBuilder

    inside = {f.distribution_path for f in WheelBuilder(str(ROOT)).recurse_included_files()}
    homes = {"llmquant": ROOT, "llmquant_eval": ROOT / "eval", "llmquant_serve": ROOT / "serve"}
    sources = {
        path.relative_to(home).as_posix()
        for package, home in homes.items()
        for path in (home / package).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"}
    }
    recipes = {f"llmquant/_recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert {"llmquant/__init__.pyi", "llmquant/py.typed"} < sources
    assert inside == sources | recipes
