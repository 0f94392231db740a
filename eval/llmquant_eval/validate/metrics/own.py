"""Scorers of the user's own: ``FILE.py:FUNCTION``. The file is Python code and it is run.

A scorer gets the row as it is in the data and the answer without what was thought before it. It
returns a number, true or false, several of them by name, or None where it has nothing to say of the
row. Whatever it raises becomes an error that names the line.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.validate.examples import Example

Function = Callable[[dict[str, Any], str], object]


@dataclass(frozen=True, slots=True)
class Scorer:
    """A function that was loaded. ``sha256`` is its file's: what it returned holds for that."""

    source: str
    name: str
    sha256: str
    function: Function

    def scores(self, example: Example, answer: str) -> dict[str, float]:
        """By metric: the function's name, or the names it gives.

        Raises:
            LlmquantError: it failed, or returned no number.
        """
        with _output_to_stderr():
            try:
                got = self.function(copy.deepcopy(dict(example.row)), answer)
            except (Exception, SystemExit) as e:  # whatever the user's code does
                raise LlmquantError(
                    f"scorer {self.source} raised {type(e).__name__}: {e}; mend it and run the same command"
                ) from e
        named = got if isinstance(got, Mapping) else {self.name: got}
        return {
            str(name): self._number(str(name), value)
            for name, value in named.items()
            if value is not None
        }

    def _number(self, name: str, value: object) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's, of several numbers
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise LlmquantError(
                f"scorer {self.source} returned {value!r:.80} for {name}, which is no number; "
                "mend it and run the same command"
            )
        return number


def load_scorer(source: str) -> Scorer:
    """``FILE.py:FUNCTION`` → the function; runs the file.

    Raises:
        UsageError: no such file or function, or the file cannot be imported.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UsageError(f"--scorer {source}: write FILE.py:FUNCTION")
    if not path.is_file():
        raise UsageError(f"--scorer {source}: {file} is not a file")
    # A name that shadows no module; it is registered, because dataclasses look theirs up.
    spec = importlib.util.spec_from_file_location(f"_scorer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--scorer {source}: {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))  # for what it imports from beside it
    with _output_to_stderr():
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:  # whatever the user's code does
            raise UsageError(
                f"--scorer {source}: {file} cannot be imported: {type(e).__name__}: {e}"
            ) from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--scorer {source}: {file} has no function {name}")
    return Scorer(source, name, hashlib.sha256(path.read_bytes()).hexdigest(), function)


def _output_to_stderr() -> contextlib.AbstractContextManager[object]:
    """stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)
