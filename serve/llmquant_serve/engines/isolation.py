"""One request's failure stays its own: whatever its work raises becomes an error of that request.

This is the only place of the package that catches every exception. Everything that runs for one
request stands inside it: choosing a token, turning it into text, the route. The engine, the
connection and the other requests never see what went wrong there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import EngineError

_LOG = logging.getLogger(__name__)


@contextmanager
def one_request(doing: str) -> Iterator[None]:
    """Run a part of one request's work.

    Args:
        doing: what the work is, for the log and the message: ``choosing a token``.

    Raises:
        EngineError: something of ours failed; it is in the log with its traceback. What is an
            answer already (an error of llmquant's own tree) passes through.
    """
    try:
        yield
    except LlmquantError:
        raise
    except Exception as e:
        _LOG.error("a request failed while %s", doing, exc_info=e)
        raise EngineError(f"this request failed while {doing}: {type(e).__name__}: {e}") from e
