"""``llmquant chat`` in a terminal: read a line, print the reply as it is generated, repeat. Ctrl-C
stops a reply; between replies it ends the chat, as does the end of the input.

The conversation changes only with a reply: a message that was refused, or whose reply failed, is
not part of it. Bytes that are no text are a message that is refused.
"""

from __future__ import annotations

import asyncio
import io
import signal
import sys
from contextlib import aclosing, suppress

from llmquant.errors import LlmquantError
from llmquant_serve.chat.replies import Reply, reply
from llmquant_serve.engines.base import EngineError, Sampling
from llmquant_serve.generation.errors import TextError
from llmquant_serve.generation.text_model import check_text
from llmquant_serve.service import Service

_HELP = "commands: /system TEXT sets the system prompt, /reset clears the conversation, /retry asks again, /exit ends the chat"


class Terminal:
    """One conversation.

    Raises:
        TextError: the system prompt is no text.
    """

    def __init__(self, service: Service, sampling: Sampling, system: str) -> None:
        self._service, self._sampling = service, sampling
        check_text(system, "--system")
        self._system, self._turns = system, list[dict[str, str]]()

    async def run(self) -> None:
        """Start the engine and chat until the input ends."""
        await self._service.engine.start()
        try:
            await self._until_ready()
            if self._service.computing:
                _note(f"computing in {self._service.computing}")
            _note(f"chatting with {self._service.model}; {_HELP}")
            _take_any_bytes()
            while (line := await asyncio.to_thread(_read)) is not None:
                if line.strip() and not await self._handle(line.strip()):
                    break
                if (state := self._service.engine.health()).dead:
                    raise EngineError(state.detail)
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
            self._turns = []
        elif command == "/system":
            self._set_system(rest)
        elif command == "/retry" and self._turns:
            await self._reply(self._turns[:-1])
        elif command.startswith("/"):
            _note(_HELP)
        else:
            await self._reply([*self._turns, {"role": "user", "content": line}])
        return True

    def _set_system(self, text: str) -> None:
        try:
            check_text(text, "the system prompt")
        except TextError as e:
            _note(f"error: {e}")
        else:
            self._system = text

    async def _reply(self, turns: list[dict[str, str]]) -> None:
        """Print the reply to ``turns``, which then are the conversation; Ctrl-C stops it."""
        task = asyncio.create_task(self._print_reply(turns))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            with suppress(asyncio.CancelledError):
                await task
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _print_reply(self, turns: list[dict[str, str]]) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        before, printed = self._turns, Reply()
        try:
            async with aclosing(reply(self._service, [*system, *turns], self._sampling)) as growing:
                async for now in growing:
                    sys.stdout.write(now.text[len(printed.text) :])
                    sys.stdout.flush()
                    printed = now
                    self._turns = [*turns, {"role": "assistant", "content": now.text}]
        except LlmquantError as e:
            self._turns = before
            _note(f"error: {e}; the conversation is as it was before")
        finally:
            if printed.pieces:
                sys.stdout.write("\n")
                _note(printed.status)


def _take_any_bytes() -> None:
    """Read bytes that are no UTF-8 as what they are, so that the message that has them is refused
    like any other; write what the terminal cannot show as escapes."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _read() -> str | None:
    """A line, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _note(line: str) -> None:
    """What is not part of the conversation goes to stderr."""
    sys.stderr.write(f"{line}\n")
