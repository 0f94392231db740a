"""``llmquant doctor``: what it says of a machine that is whole, and of several that are not."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmquant.cli import app
from llmquant.cli.checkup import engines, machine
from llmquant.cli.checkup.machine import look
from llmquant.kernels import KERNELS
from llmquant.runtime.devices import parse_dtype


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    return done.exit_code, done.stdout


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM of the machine that tests run on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMQUANT_VLLM_PYTHON", raising=False)


def test_it_tells_people_everything_and_leaves_with_0() -> None:
    code, out = doctor()
    assert code == 0
    auto = parse_dtype("auto")
    for words in (
        "processor",
        "instructions",
        "auto dtype, cpu",
        auto.name,
        "kernel W4 g128",
        "threads",
        "memory",
        "swap",
        "disk",
        "torch",
        "vllm",
        "for eval",
        "for serve",
        "for ONNX exports",
        "for llama.cpp",
        "llmquant can work here",
    ):
        assert words in out, words
    assert auto.reason is not None
    assert auto.reason.split("(")[0].strip() in " ".join(out.split())


def test_json_is_one_object_with_the_same_facts() -> None:
    code, out = doctor("--json")
    told = json.loads(out)
    assert (code, told["ok"], told["problems"]) == (0, True, [])
    assert told["auto"]["cpu_dtype"] == parse_dtype("auto").name
    assert list(told["kernels"]) == ["W2 g128", "W3 g128", "W4 g128", "W8 g128"]
    for facts in told["kernels"].values():
        before = list(KERNELS)[: list(KERNELS).index(facts["kernel"])]
        assert list(facts["not"]) == before, "every kernel that is preferred says why not"
    assert {"total", "available", "swap", "swap_free"} == told["memory"].keys()
    assert told["disk"]["free"] > 0
    assert {"eval", "serve", "gpu", "ONNX exports", "llama.cpp"} == told["extras"].keys()


@pytest.mark.parametrize(
    ("script", "ready", "told"),
    [
        pytest.param(None, False, "is not there", id="no such Python"),
        pytest.param(
            "#!/bin/sh\necho noise; echo llmquant-vllm 0.32.0\n", True, "0.32.0", id="there"
        ),
        pytest.param(
            "#!/bin/sh\necho 'ModuleNotFoundError: No module named vllm' >&2; exit 1\n",
            False,
            "No module named vllm",
            id="without vLLM",
        ),
        pytest.param("#!/bin/sh\nexit 0\n", False, "exit code 0", id="says nothing"),
        pytest.param("not a program", False, "cannot be started", id="no program"),
    ],
)
def test_vllm_is_asked_in_its_own_environment(
    script: str | None, ready: bool, told: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(script)
        python.chmod(0o755)
    found = engines.vllm({"LLMQUANT_VLLM_PYTHON": str(python)})
    assert found["ready"] is ready
    assert told in str(found)
    assert ready or "make vllm-env" in found["install"]
    assert "vllm" not in sys.modules


def test_vllm_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 30\n")
    python.chmod(0o755)
    monkeypatch.setattr(engines, "_VLLM_SECONDS", 0.2)
    assert "took more than" in engines.vllm({"LLMQUANT_VLLM_PYTHON": str(python)})["reason"]


def broken(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    real = importlib.import_module

    def imported(module: str, package: str | None = None) -> Any:
        if module == name:
            raise error
        return real(module, package)

    monkeypatch.setattr(machine.importlib, "import_module", imported)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param(
            "torch",
            ImportError("libtorch_cpu.so: cannot open shared object file"),
            id="torch does not import",
        ),
        pytest.param("transformers", RuntimeError("two\nlines"), id="transformers does not import"),
        pytest.param("torch", OSError(), id="an error without words"),
    ],
)
def test_what_is_needed_and_broken_is_a_problem(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, name, error)
    code, out = doctor()
    assert code == 1
    assert f"problem: {name} cannot be imported" in out
    assert f"pip install --force-reinstall {name}" in out
    assert json.loads(doctor("--json")[1])["ok"] is False


def without(monkeypatch: pytest.MonkeyPatch, *names: str, instead: str | None = None) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: instead if name in names else real(name))


def test_an_extra_that_is_not_there_breaks_nothing_and_tells_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "fastapi", "matplotlib")
    found = look()
    assert found.ok
    assert found.extras["serve"] == {
        "missing": ["fastapi>=0.115"],
        "install": "pip install 'llmquant[serve]'",
    }
    assert found.extras["eval"]["missing"] == ["matplotlib>=3.9"]


def test_a_package_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "safetensors", instead="0.1")
    assert [p for p in look().problems if "safetensors>=0.6 (there is 0.1) is needed" in p]


def test_sources_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "requires", none)
    assert "pip install -e ." in machine._requirements({})[0]


def test_held_down_it_says_by_what() -> None:
    code = "from llmquant.cli import main; import sys; sys.argv = ['llmquant', 'doctor', '--json']; main()"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    told = json.loads(done.stdout)["processor"]
    assert not {"avx2", "avx512f"} & set(told["instruction_sets"])
    if "avx2" in told["held_back"]:
        assert told["held_by"] == ["ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=SSE41"]


def test_a_kernel_that_was_not_compiled_is_a_hint_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert look().compiled["compiled"]
    monkeypatch.setattr("llmquant.runtime.native_library.library", lambda: None)
    monkeypatch.setattr("llmquant.kernels.native.library", lambda: None)
    found = look()
    assert not found.problems
    assert any("kernel cpu is missing" in hint and "install g++" in hint for hint in found.hints)
    assert found.kernels["W8 g128"]["kernel"] == "reference"


def test_its_help_does_not_pay_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['llmquant', 'doctor', '--help']\nfrom llmquant.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
