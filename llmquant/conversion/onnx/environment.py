"""The environment that has ONNX Runtime: where its Python is, and how a script is run there.

It is found as vLLM's is: what the caller names, else ``LLMQUANT_ONNX_PYTHON``, else ``.venv-onnx``
in the current folder, which ``make onnx-env`` makes.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmquant.checkpoint.atomic import disk
from llmquant.errors import LlmquantError, UsageError

VARIABLE = "LLMQUANT_ONNX_PYTHON"
INSTALL = (
    "make onnx-env (in llmquant's sources), or pip install -r onnx-requirements.txt in an "
    f"environment of its own; name its Python in {VARIABLE}"
)
_PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers")
_VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_TAIL = 1500
INSIDE = Path(__file__).parent / "inside"


@dataclass(frozen=True, slots=True)
class OnnxEnvironment:
    """A Python that has onnxruntime-genai, and the versions of what it has."""

    python: Path
    versions: Mapping[str, str]

    def command(self, script: str, *arguments: str) -> list[str]:
        """The command line of a script in ``inside/``; nothing of our own Python is on its
        path."""
        return [str(self.python), "-I", str(INSIDE / f"{script}.py"), *arguments]

    def script(self, what: str, script: str, folder: Path, *arguments: str) -> str:
        """Run a script of ``inside/`` on files in a folder; returns its stdout.

        Raises:
            LlmquantError: it failed; carries the end of what it printed.
            DiskError: for want of space.
        """
        return self.run(what, self.command(script, *arguments), folder)

    def run(self, what: str, command: Sequence[str], folder: Path) -> str:
        """Run a command of this environment to its end; returns its stdout. See :meth:`script`.

        Its output goes to files: a pipe that fills would stop it.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=clean_environment(),
            ) as process:
                try:
                    code = process.wait()
                finally:
                    process.kill()  # nothing, once it has ended
            out.seek(0)
            said = out.read().decode(errors="replace")
            if code == 0:
                return said
            err.seek(0)
            tail = f"{said[-_TAIL:]}\n{err.read().decode(errors='replace')}".strip()[-_TAIL:]
        if "No space left on device" in tail:
            with disk(folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        how = "was killed, probably for memory" if code == -9 else f"failed (exit {code})"
        raise LlmquantError(f"{what} {how}; the end of its output:\n{tail}")


def clean_environment() -> dict[str, str]:
    """Our environment without what belongs to our Python, and without telemetry or the hub."""
    kept = {k: v for k, v in os.environ.items() if k not in _OURS}
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUTF8": "1"}


def find_onnx(python: str | os.PathLike[str] | None = None) -> OnnxEnvironment:
    """The environment, whose packages are asked for.

    Args:
        python: its Python; None looks for it.

    Raises:
        UsageError: it is not there, or lacks a package.
    """
    named = python or os.environ.get(VARIABLE)
    path = Path(named) if named else Path(".venv-onnx") / "bin" / "python"
    if not path.is_file():
        raise UsageError(
            f"ONNX Runtime needs an environment of its own, and {path} is not there: {INSTALL}"
        )
    path = Path(os.path.abspath(path))  # a link to the base Python stays a link
    try:
        done = subprocess.run(
            [str(path), "-I", "-c", _VERSIONS, *_PACKAGES],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=clean_environment(),
        )
    except OSError as e:
        raise UsageError(f"{path} cannot be started: {e.strerror or e}") from e
    found = done.stdout.split()
    if done.returncode != 0 or len(found) != len(_PACKAGES):
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise UsageError(f"{path} lacks what the export needs ({last}): {INSTALL}")
    return OnnxEnvironment(path, dict(zip(_PACKAGES, found, strict=True)))
