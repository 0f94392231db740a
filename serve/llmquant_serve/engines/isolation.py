"""One request's failure stays its own: whatever its work raises becomes an error of that request.

This is the only place of the package that catches every ``Exception``. A fault that nobody foresaw
in one request must not end the requests beside it, and which exceptions a stranger's tokenizer,
template or model raises cannot be listed. Everything that runs for one request runs inside it:
choosing a token, turning it into text, the route. What is meant to end more than a request is no
``Exception`` and passes through: KeyboardInterrupt, SystemExit, asyncio's CancelledError.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import EngineError

_LOG = logging.getLogger(__name__)


@contextmanager
def isolated(failed: str) -> Iterator[None]:
    """Run a part of one request's work, or the engine.

    Args:
        failed: what to say of a failure: ``this request failed while choosing a token``.

    Raises:
        EngineError: something of ours failed; it is in the log with its traceback. What is an
            answer already (an error of llmquant's own tree) passes through.
    """
    try:
        yield
    except LlmquantError:
        raise
    except Exception as e:
        _LOG.error(failed, exc_info=e)
        raise EngineError(f"{failed}: {type(e).__name__}: {e}") from e
