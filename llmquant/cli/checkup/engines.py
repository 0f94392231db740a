"""What ``llmquant doctor`` says of engines beside llmquant: vLLM in its environment, llama.cpp on
the PATH, and what each takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BROKEN = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    ValueError,
)  # what importing a broken package raises
BITS = (2, 3, 4, 8)
GROUP = 128
_VLLM_SECONDS = 120  # importing it takes a while where the disk is cold
_VLLM_CODE = "import vllm; print('llmquant-vllm', vllm.__version__)"
_LLAMA_CPP = ("llama-cli", "llama-server", "llama-perplexity")


def takes(name: str) -> dict[str, Any]:
    """What an engine of llmquant's table takes and refuses: of symmetric compressed-tensors weights
    in groups."""
    from llmquant.formats import Scheme
    from llmquant.formats.engines import ENGINES, why_not
    from llmquant.spec import QuantSpec

    takes, refuses = [], {}
    for known in (e for e in ENGINES if e.lower().startswith(name)):
        for bits in BITS:
            reason = why_not(known, "compressed-tensors", Scheme(QuantSpec(bits, GROUP)))
            if reason is None:
                takes.append(f"W{bits}")
            else:
                refuses[f"W{bits}"] = reason
    return {"takes": takes, "refuses": refuses}


def vllm(environment: Mapping[str, str]) -> dict[str, Any]:
    """Whether vLLM can be imported in its environment; asked in another process, because it is
    never imported into this one."""
    asked = environment.get("LLMQUANT_VLLM_PYTHON", "")
    # A folder named vllm on the path is found too, but has no origin.
    here = getattr(find_spec("vllm"), "origin", None)
    python = Path(asked or (sys.executable if here else Path(".venv-vllm") / "bin" / "python"))
    facts: dict[str, Any] = {"ready": False, "python": str(python)}
    install = "pip install 'llmquant[vllm]' (for a GPU), or make vllm-env (in llmquant's sources, for a CPU), or name the "
    install += "Python of an environment that has it in LLMQUANT_VLLM_PYTHON"
    if not python.is_file():
        return {**facts, "reason": f"{python} is not there", "install": install}
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _VLLM_CODE],
            capture_output=True,
            text=True,
            check=False,
            timeout=_VLLM_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {
            **facts,
            "reason": f"importing vllm took more than {_VLLM_SECONDS} s",
            "install": install,
        }
    except OSError as e:
        return {**facts, "reason": f"{python} cannot be started: {e}", "install": install}
    match = re.search(r"^llmquant-vllm (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or match is None:
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        return {**facts, "reason": f"vllm cannot be imported there: {last}", "install": install}
    answer: dict[str, Any] = {}
    with suppress(*BROKEN):  # a broken torch is reported as a problem
        answer = takes("vllm")
    return {**facts, "ready": True, "version": match[1], **answer}


def onnx() -> dict[str, Any]:
    """Whether there is an environment with ONNX Runtime, which exports need."""
    from llmquant.conversion.onnx.environment import INSTALL, find_onnx
    from llmquant.errors import LlmquantError

    missing = []
    try:
        find_onnx()
    except LlmquantError as e:
        missing.append(str(e).removesuffix(f": {INSTALL}"))
    return {"missing": missing, "install": INSTALL}


def llama_cpp() -> dict[str, Any]:
    there = [name for name in _LLAMA_CPP if shutil.which(name)]
    return {
        "missing": [] if there else [" or ".join(_LLAMA_CPP)],
        "install": "brew install llama.cpp, or build https://github.com/ggml-org/llama.cpp",
    }
