"""``llmquant chat`` in a terminal: read a line, print the reply as it is generated, repeat. Ctrl-C
stops a reply; between replies it ends the chat, as does the end of the input.
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

_HELP = "commands: /system TEXT sets the system prompt, /reset clears the conversation, /retry asks again, /exit ends the chat"


class Terminal:
    """One conversation."""

    def __init__(self, service: Service, sampling: Sampling, system: str) -> None:
        self._service, self._sampling = service, sampling
        self._system, self._turns = system, list[dict[str, str]]()

    async def run(self) -> None:
        """Start the engine and chat until the input ends."""
        await self._service.engine.start()
        try:
            await self._until_ready()
            if self._service.computing:
                _note(f"computing in {self._service.computing}")
            _note(f"chatting with {self._service.model}; {_HELP}")
            while (line := await asyncio.to_thread(_read)) is not None:
                if line.strip() and not await self._handle(line.strip()):
                    break
        finally:
            await self._service.engine.close()

    async def _until_ready(self) -> None:
        while not (state := self._service.engine.health()).ok:
            _note(state.detail)
            await asyncio.sleep(2)

    async def _handle(self, line: str) -> bool:
        """Run a command, or reply to what is none; False ends the chat."""
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
            _note(_HELP)
        else:
            self._turns.append({"role": "user", "content": line})
            await self._reply()
        return True

    async def _reply(self) -> None:
        """Print a reply; Ctrl-C stops it."""
        task = asyncio.create_task(self._print_reply())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            with suppress(asyncio.CancelledError):
                await task
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _print_reply(self) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        printed = Reply()
        try:
            async with aclosing(
                reply(self._service, [*system, *self._turns], self._sampling)
            ) as growing:
                async for now in growing:
                    sys.stdout.write(now.text[len(printed.text) :])
                    sys.stdout.flush()
                    printed = now
        except LlmquantError as e:
            _note(f"error: {e}")
        finally:
            sys.stdout.write("\n")
            self._turns.append({"role": "assistant", "content": printed.text})
            _note(printed.status)


def _read() -> str | None:
    """A line, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _note(line: str) -> None:
    """What is not part of the conversation goes to stderr."""
    sys.stderr.write(f"{line}\n")
