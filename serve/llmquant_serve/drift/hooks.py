"""Hooks: what is run, and who is told, when an alarm is raised. In a thread of its own, one after
the other; an answer never waits for them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from llmquant.errors import UsageError

_COMMAND_SECONDS, _WEBHOOK_SECONDS, _TRIES = 60.0, 10.0, 3


@dataclass(frozen=True, slots=True)
class Hooks:
    """Whom to tell.

    Attributes:
        command: a program and its arguments; it gets the alarm as JSON on stdin. No shell.
        webhook: an address that gets it by POST.
    """

    command: tuple[str, ...] = ()
    webhook: str | None = None

    @classmethod
    def of(cls, command: str | None, webhook: str | None) -> Hooks:
        """From options.

        Raises:
            UsageError: there is no such program, or no such address.
        """
        words: list[str] = []
        if command is not None:
            try:
                words = shlex.split(command)
            except ValueError as e:
                raise UsageError(f"--on-drift {command!r} cannot be split into words: {e}") from e
            if not words or shutil.which(words[0]) is None:
                raise UsageError(
                    f"--on-drift: there is no program {words[0] if words else ''!r}; no shell is used, "
                    "so give a program and its arguments, sh -c '…' for example"
                )
        if webhook is not None and not _is_address(webhook):
            raise UsageError(f"--drift-webhook is {webhook!r}; it must be http://… or https://…")
        return cls(tuple(words), webhook)

    def tell(self, alarm: Mapping[str, object]) -> None:
        """Run and send; what fails is said on stderr."""
        text = json.dumps(alarm)
        if self.command:
            _say(_run(self.command, text))
        if self.webhook is not None:
            _say(_post(self.webhook, text))


class Teller:
    """The thread that tells.

    Args:
        told: called in that thread after each alarm.
    """

    def __init__(self, hooks: Hooks, told: Callable[[], None]) -> None:
        self._hooks, self._told = hooks, told
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llmquant-drift")

    def tell(self, alarm: Mapping[str, object]) -> None:
        self._pool.submit(self._tell, alarm)

    def close(self) -> None:
        """Returns when all are told."""
        self._pool.shutdown(wait=True)

    def _tell(self, alarm: Mapping[str, object]) -> None:
        self._hooks.tell(alarm)
        self._told()


def _run(command: tuple[str, ...], text: str) -> str | None:
    """What went wrong."""
    try:
        done = subprocess.run(
            command, input=text, text=True, timeout=_COMMAND_SECONDS, check=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"--on-drift {command[0]} failed: {e}"
    if done.returncode:
        return f"--on-drift {command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    return None


def _post(url: str, text: str) -> str | None:
    """What went wrong."""
    why = ""
    for _ in range(_TRIES):
        try:
            answer = httpx.post(
                url,
                content=text,
                headers={"Content-Type": "application/json"},
                timeout=_WEBHOOK_SECONDS,
            )
        except httpx.HTTPError as e:
            why = str(e)
            continue
        if answer.is_success:
            return None
        why = f"it answered {answer.status_code}"
    return f"--drift-webhook {url} was not told after {_TRIES} tries: {why}"


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _say(problem: str | None) -> None:
    if problem is not None:
        sys.stderr.write(f"warning: {problem}\n")
        sys.stderr.flush()
