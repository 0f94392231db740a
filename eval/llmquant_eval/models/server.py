"""An HTTP server that answers JSON: one request, asked again where that can help.

Standard library only; a key is taken from ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.answers import QUOTED
from llmquant_eval.models.retrying import AGAIN, Retrying, UnavailableError, seconds_to_wait

TIMEOUT_SECONDS = 600.0


class RefusedError(LlmquantError):
    """The server does not take a request as it was written (400, 422)."""


class Server:
    """The server at ``source``, an address up to and with ``/v1``.

    Raises:
        UsageError: not an address.
    """

    def __init__(self, url: str, source: str, retrying: Retrying) -> None:
        _check_address(url, source)
        self.url, self.retrying = url.rstrip("/"), retrying

    def request(self, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        """The object that ``path`` answers to ``body``; GET where that is None.

        Raises:
            RefusedError: 400 or 422.
            LlmquantError: any other status, no JSON object, or no answer as long as the patience
                lasts.
        """
        answer = self.retrying.ask(lambda: self._send(path, body))
        if not isinstance(answer, dict):
            raise LlmquantError(
                f"{self.url}{path} answered {json.dumps(answer)[:QUOTED]}, not an object"
            )
        return answer

    def _send(self, path: str, body: Mapping[str, object] | None) -> Any:
        """One request, asked once."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        got = b""
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                got = response.read()
            return json.loads(got)
        except urllib.error.HTTPError as e:
            raise self._answered(path, e) from e
        except (OSError, http.client.HTTPException) as e:  # a cut answer is no OSError
            reason = getattr(e, "reason", e)
            why = f"{self.url} cannot be reached: {reason}"
            if _is_final(reason):
                raise LlmquantError(f"{why}; check the address") from e
            raise UnavailableError(why, connected=False) from e
        except ValueError as e:
            why = f"{self.url}{path} did not answer JSON: {e}"
            if not got.strip() or got.lstrip().startswith(b"{"):  # cut, with no length to tell by
                raise UnavailableError(why, connected=False) from e
            raise LlmquantError(why) from e

    def _answered(self, path: str, error: urllib.error.HTTPError) -> LlmquantError:
        """What a status other than 200 means."""
        try:
            said = error.read().decode(errors="replace")[:QUOTED]
        except (OSError, http.client.HTTPException):
            said = error.reason
        why = f"{self.url}{path} answered {error.code}: {said}"
        if error.code in AGAIN:
            return UnavailableError(why, seconds_to_wait(error.headers.get("Retry-After")))
        return RefusedError(why) if error.code in (400, 422) else LlmquantError(why)


def _is_final(reason: object) -> bool:
    """Whether asking again cannot help: no such host, a certificate that is not trusted."""
    unknown = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    return unknown or isinstance(reason, ssl.SSLCertVerificationError)


def _check_address(url: str, source: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, half an IPv6 address
        valid = False
    if not valid:
        raise UsageError(f"{source} is not a server's address; write http://HOST:PORT/v1#MODEL")
