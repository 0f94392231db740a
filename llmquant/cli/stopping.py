"""Ctrl-C, and SIGTERM, which schedulers send before they kill: a run stops, says what it leaves,
and exits with 130."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import NoReturn

from llmquant.runtime.signals import heeded, stops


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it either signal ends the process with what the run says of it, on stderr."""
    with heeded(), ExitStack() as stack:
        stack.push(_told)
        yield


def _told(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    if error is not None and stops(error):
        tell(error)


def tell(error: BaseException) -> NoReturn:
    """End the process with what the run says of its interruption, on stderr."""
    saved = isinstance(error, KeyboardInterrupt) and error.args
    said = error.args[0] if saved else "no incomplete output remains"
    sys.stderr.write(f"interrupted; {said}\n")
    raise SystemExit(130) from None
