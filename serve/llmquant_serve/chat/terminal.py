"""``llmquant chat`` in a terminal: read, reply as it is made, repeat. Ctrl-C stops a reply; between
replies it leaves, as does the end of the input.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import aclosing, suppress

from llmquant.errors import LlmquantError
from llmquant_serve.chat.replies import Reply, reply
from llmquant_serve.engines.base import Sampling
from llmquant_serve.service import Service

_HELP = "/system TEXT sets the system prompt, /reset forgets the conversation, /retry asks again, /exit leaves"


class Terminal:
    """One conversation."""

    def __init__(self, service: Service, sampling: Sampling, system: str) -> None:
        self._service, self._sampling = service, sampling
        self._system, self._turns = system, list[dict[str, str]]()

    async def run(self) -> None:
        """Talk until the input ends."""
        await self._service.engine.start()
        try:
            await self._until_ready()
            if self._service.computing:
                _aside(f"computing in {self._service.computing}")
            _aside(f"{self._service.model}; {_HELP}")
            while (line := await asyncio.to_thread(_read)) is not None:
                if line.strip() and not await self._obeyed(line.strip()):
                    break
        finally:
            await self._service.engine.close()

    async def _until_ready(self) -> None:
        while not (state := self._service.engine.health()).ok:
            _aside(state.detail)
            await asyncio.sleep(2)

    async def _obeyed(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return False
        if command == "/reset":
            self._turns.clear()
        elif command == "/system":
            self._system = rest
        elif command == "/retry" and self._turns:
            del self._turns[-1]
            await self._reply()
        elif command.startswith("/"):
            _aside(_HELP)
        else:
            self._turns.append({"role": "user", "content": line})
            await self._reply()
        return True

    async def _reply(self) -> None:
        task = asyncio.create_task(self._speak())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            with suppress(asyncio.CancelledError):
                await task
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _speak(self) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        said = Reply()
        try:
            async with aclosing(
                reply(self._service, [*system, *self._turns], self._sampling)
            ) as growing:
                async for now in growing:
                    sys.stdout.write(now.text[len(said.text) :])
                    sys.stdout.flush()
                    said = now
        except LlmquantError as e:
            _aside(f"error: {e}")
        finally:
            sys.stdout.write("\n")
            self._turns.append({"role": "assistant", "content": said.text})
            _aside(said.status)


def _read() -> str | None:
    """A line, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _aside(line: str) -> None:
    """What is not part of the conversation goes to stderr."""
    sys.stderr.write(f"{line}\n")
