"""``llmquant`` in this process, as a user's shell sees it, for the tables of this folder."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from llmquant.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """stdout and stderr with white space made single: a table breaks lines."""
        return " ".join((self.out + self.err).split())


def llmquant_command(*arguments: object) -> Ran:
    """Exit code, stdout and stderr; an exception that would be a traceback comes through."""
    out, err = io.StringIO(), io.StringIO()
    words = ["llmquant", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())
