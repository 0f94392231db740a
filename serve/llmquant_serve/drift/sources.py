"""Where ``llmquant monitor`` looks: a log, or a server."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from pydantic import ValidationError

from llmquant import DriftMonitor, DriftProfile, DriftReport, make_drift_profile
from llmquant.errors import LlmquantError, UsageError
from llmquant_serve.drift.log import read_log

_SECONDS = 20.0


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def report_of(source: str) -> DriftReport:
    """Where the monitor of a log or a server is.

    Raises:
        UsageError: it is neither, or a server that watches no drift.
        LlmquantError: the server does not answer.
    """
    return _asked(source) if is_url(source) else _replayed(Path(source))


def profile_of(source: str) -> DriftProfile:
    """A profile of the requests in a log.

    Raises:
        UsageError: it is no log, or has too few of them.
    """
    if is_url(source):
        raise UsageError("--profile needs the log itself; give the file that serve --drift writes")
    header, entries = read_log(Path(source))
    known = header.profile
    return make_drift_profile(list(entries), known.model, known.tokenizer_sha256)


def _replayed(path: Path) -> DriftReport:
    header, entries = read_log(path)
    monitor = DriftMonitor(header.profile, header.alpha)
    for entry in entries:
        monitor.add(entry)
    return monitor.report()


def _asked(url: str) -> DriftReport:
    base = url.rstrip("/").removesuffix("/drift").removesuffix("/v1")
    key = os.environ.get("LLMQUANT_API_KEY", "")
    if not key.isascii():
        raise UsageError("LLMQUANT_API_KEY is not ASCII, as every key of llmquant serve is")
    try:
        answer = httpx.get(
            f"{base}/drift",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_SECONDS,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise LlmquantError(f"{base} does not answer: {e}; is the server running?") from e
    if answer.status_code in (401, 403):
        raise UsageError(f"{base} wants an API key; set LLMQUANT_API_KEY")
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise UsageError(
            f"{base} does not watch drift; start it with llmquant serve --drift PROFILE"
        )
    try:
        answer.raise_for_status()
        return DriftReport.model_validate_json(answer.content)
    except (httpx.HTTPStatusError, ValidationError) as e:
        raise LlmquantError(
            f"{base}/drift answered something else (status {answer.status_code}); is it llmquant serve?"
        ) from e
