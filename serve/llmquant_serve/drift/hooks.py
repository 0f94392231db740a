"""Hooks: what is run, and who is told, when an alarm is raised. In a thread of its own, one after
the other; an answer never waits for them, and a shutdown not for long."""

from __future__ import annotations

import json
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from llmquant.errors import UsageError

_COMMAND_SECONDS, _WEBHOOK_SECONDS = 60.0, 10.0
_TRIES, _PAUSE_SECONDS = 3, 1.0  # of a webhook
_CLOSE_SECONDS = 10.0  # that a shutdown waits for hooks


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
    """The thread that tells. It ends with the process, whether all is told or not."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, object], Callable[[], None]] | None]
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="llmquant-drift", daemon=True)
        self._thread.start()

    def tell(self, alarm: Mapping[str, object], told: Callable[[], None]) -> None:
        """Tell of an alarm soon; ``told`` is called in the thread after that."""
        self._waiting.put((alarm, told))

    def close(self) -> None:
        """Returns when all are told, or after ten seconds."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _say(
                f"--on-drift or --drift-webhook did not end within {_CLOSE_SECONDS:g} s; "
                "alarms that were not told are told at the next start"
            )

    def _work(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            alarm, told = waiting
            self._hooks.tell(alarm)
            told()


def _run(command: tuple[str, ...], text: str) -> str | None:
    """What went wrong."""
    try:
        done = subprocess.run(
            command, input=text, text=True, errors="replace", timeout=_COMMAND_SECONDS,
            check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"--on-drift {command[0]} failed: {e}"
    if done.returncode:
        return f"--on-drift {command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    return None


def _post(url: str, text: str) -> str | None:
    """What went wrong. The address may hold a secret, so only its host is named."""
    why, headers = "", {"Content-Type": "application/json"}
    for i in range(_TRIES):
        time.sleep(_PAUSE_SECONDS if i else 0)
        try:
            with httpx.stream(
                "POST", url, content=text, headers=headers, timeout=_WEBHOOK_SECONDS
            ) as answer:  # its body may have no end, and says nothing
                if answer.is_success:
                    return None
                why = f"it answered {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as e:
            why = str(e) or type(e).__name__
    return f"--drift-webhook {httpx.URL(url).host} was not told after {_TRIES} tries: {why}"


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
