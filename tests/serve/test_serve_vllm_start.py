"""Which vLLM is started; no vLLM is needed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from llmquant.cli.checkup import engines as checkup
from llmquant.errors import UsageError
from llmquant_serve.build import build_engine
from llmquant_serve.engines import vllm
from llmquant_serve.engines.options import ModelOptions

INSTALLED = ModuleSpec("vllm", None, origin="site-packages/vllm/__init__.py")
A_FOLDER = ModuleSpec("vllm", None, is_package=True)  # of that name on the path


def started(monkeypatch: pytest.MonkeyPatch, model: Path, **options: Any) -> Path:
    """The Python that vLLM is started with."""
    made: list[Any] = []
    monkeypatch.setattr(vllm, "VllmChild", made.append)
    build_engine(ModelOptions(model=str(model), engine="vllm", **options), 8)
    return Path(made[0].python)


def test_vllm_of_this_environment_is_found(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda _: INSTALLED)
    assert started(monkeypatch, packed) == Path(sys.executable)
    assert started(monkeypatch, packed, vllm_python="/bin/sh") == Path("/bin/sh")


def test_doctor_asks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda _: INSTALLED)
    assert checkup.vllm({})["python"] == sys.executable
    monkeypatch.setattr(checkup, "find_spec", lambda _: A_FOLDER)
    assert checkup.vllm({})["python"] == str(Path(".venv-vllm", "bin", "python"))


@pytest.mark.parametrize("found", [None, A_FOLDER], ids=["nothing", "a folder"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({}, r"llmquant\[vllm\].*--vllm-python", id="no vLLM"),
        pytest.param({"vllm_python": "/nowhere/python"}, "/nowhere/python", id="a wrong Python"),
        pytest.param({"vllm_url": "localhost:8000"}, "http://", id="no URL"),
    ],
)
def test_misuse(
    found: ModuleSpec | None, changes: dict[str, Any], message: str, packed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm, "find_spec", lambda _: found)
    with pytest.raises(UsageError, match=message):
        build_engine(ModelOptions(model=str(packed), engine="vllm", **changes), 8)
