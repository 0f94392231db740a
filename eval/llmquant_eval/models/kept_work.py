"""What an evaluation has measured so far, on disk, so that the same command resumes after a kill.

It is a convenience: where it cannot be kept (a full disk, a read-only home, the same command in
another process) the evaluation goes on without it and says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmquant.errors import LlmquantError
from llmquant_eval.models.journal import Journal, key_of, opened

_KEPT_FOR = 30 * 24 * 3600.0  # seconds after which nobody is expected to resume
_SUFFIX = ".unfinished.jsonl"


class KeptWork:
    """Values by what they were measured of. Without a journal nothing is kept.

    Args:
        tell: gets what is said when keeping fails.
    """

    def __init__(
        self, journal: Journal | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        self._journal, self._tell = journal, tell

    def get(self, *what: object) -> Any:
        """The value kept of ``what``, which JSON can write, or None."""
        return None if self._journal is None else self._journal.get(key_of(*what))

    def add(self, value: Any, *what: object) -> None:
        """Keep a value, which JSON can write and which is not None."""
        if self._journal is None:
            return
        try:
            self._journal.add(key_of(*what), value)
        except LlmquantError as e:
            self._journal = None
            if self._tell is not None:
                self._tell(f"warning: this run cannot be resumed: {_cause(e)}")


@contextmanager
def kept_work(folder: Path, identity: str, tell: Callable[[str], None]) -> Iterator[KeptWork]:
    """What a run of ``identity`` left in ``folder``, to be added to. It is deleted when the block
    is done, and stays when that fails.

    Args:
        folder: made where there is none; what has lain in it for 30 days is deleted.
        identity: hex sha256 of all that the values depend on.
        tell: gets sentences for people.
    """
    path = folder / f"{identity}{_SUFFIX}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _forget_old(folder)
            journal = stack.enter_context(opened(path, restart=False))
        except (OSError, LlmquantError) as e:
            tell(f"note: this run cannot be resumed: {_cause(e)}")
            yield KeptWork()
            return
        if len(journal):
            tell(
                f"resuming what an unfinished run measured, kept in {path}; delete it to start over"
            )
        try:
            yield KeptWork(journal, tell)
        except KeyboardInterrupt as e:
            if len(journal):
                raise KeyboardInterrupt(
                    f"what was measured is kept in {path}; the same command resumes"
                ) from e
            raise


def _cause(error: Exception) -> str:
    """Without what to do, which is for those whose results are kept there."""
    return str(error).partition(";")[0]


def _forget_old(folder: Path) -> None:
    limit = time.time() - _KEPT_FOR
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # another run may have deleted it
            if path.stat().st_mtime < limit:
                path.unlink()
