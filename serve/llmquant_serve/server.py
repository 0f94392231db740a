"""Run a service under uvicorn: bind, announce, and stop in order.

After SIGTERM or Ctrl-C no request is accepted. Running answers get ``drain_seconds`` to end; then
the engine is closed and they end with a 503, or with an error as the last event of a stream.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from llmquant.errors import UsageError
from llmquant_serve.api.app import UI_PATH, create_app
from llmquant_serve.api.transport.addresses import THIS_MACHINE, believing, is_origin, is_prefix
from llmquant_serve.chat.opening import Opening
from llmquant_serve.engines.base import EngineError
from llmquant_serve.service import Service

_BACKLOG = 1024
_END_SECONDS = 5  # for answers that were cut off to say so


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a server listens, and for whom.

    Attributes:
        keys: accepted API keys; without any, requests need none.
        cors_origins: web origins whose pages may call the API.
        ui: serve the chat page.
        access_log: log every request.
        root_path: the prefix under which a reverse proxy serves all paths.
        trusted_proxies: addresses and networks whose X-Forwarded headers are believed.
    """

    host: str
    port: int
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    ui: bool = False
    access_log: bool = False
    root_path: str = ""
    trusted_proxies: tuple[str, ...] = THIS_MACHINE

    def __post_init__(self) -> None:
        if self.root_path and not is_prefix(self.root_path):
            raise UsageError(
                f"--root-path is {self.root_path!r}; it must begin with a slash and end without one, like /llm"
            )
        for origin in self.cors_origins:
            if not is_origin(origin):
                raise UsageError(
                    f"--cors-origin is {origin!r}; it must be an origin as browsers write it, like https://host:8080, or *"
                )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy if proxy != "*" else "0.0.0.0/0", strict=False)
            except ValueError as e:
                raise UsageError(
                    f"--trusted-proxy is {proxy!r}; it must be an IP address, a network like 10.0.0.0/8, or *"
                ) from e
        if any(not k.strip() or not k.isascii() or k != k.strip() for k in self.keys):
            raise UsageError(
                "an API key must be ASCII, not empty, and without spaces at its ends; change --api-key or LLMQUANT_API_KEY"
            )


def bound_socket(binding: Binding) -> socket.socket:
    """A listening socket; with port 0, on a free port.

    Raises:
        UsageError: the host is unknown or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            binding.host, binding.port, type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as e:
        raise UsageError(f"cannot find --host {binding.host}: {e.strerror or e}") from e
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        raise UsageError(
            f"cannot listen on {binding.host} port {binding.port}: {e.strerror}; choose another with --port"
        ) from e
    return sock


def run(
    service: Service,
    binding: Binding,
    listening: socket.socket,
    reference: Service | None = None,
    folder: Path | None = None,
    original: Path | None = None,
    opening: Opening | None = None,
) -> None:
    """Serve until a signal comes.

    Args:
        reference: the original model, for the chat page.
        folder: the model's, whose card the chat page shows.
        original: the folder of ``reference``.
        opening: what the settings of the chat page are at first.

    Raises:
        EngineError: an engine is dead; the process must be restarted.
    """
    if not _is_loopback(binding.host) and not binding.keys:
        _log(
            f"warning: {binding.host} can be reached from other machines and there is no API key, so anyone there can "
            "use this server; set --api-key, or listen on 127.0.0.1"
        )
    app = create_app(
        service,
        keys=binding.keys,
        cors_origins=binding.cors_origins,
        ui=binding.ui,
        reference=reference,
        root_path=binding.root_path,
        trusted_proxies=binding.trusted_proxies,
    )
    if binding.ui:
        from llmquant_serve.chat.page import mount

        mount(app, service, binding.keys, reference, folder or Path(), original, opening)
    config = uvicorn.Config(
        believing(app, binding.trusted_proxies), proxy_headers=False, server_header=False,
        log_level="info" if binding.access_log else "warning", access_log=binding.access_log,
        timeout_graceful_shutdown=math.ceil(service.limits.drain_seconds + _END_SECONDS),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, _exit)  # uvicorn drains first and then raises the signal again
    server = _Server(config, service, binding, reference)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return
    if server.dead is not None:
        raise EngineError(server.dead)


class _Server(uvicorn.Server):
    """Logs where it listens as soon as it does, and ends when an engine is dead, so that whatever
    started this process starts it again.

    Attributes:
        dead: why an engine will take no request again; None while all may.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        binding: Binding,
        reference: Service | None,
    ) -> None:
        super().__init__(config)
        self._service, self._binding = service, binding
        self._services = [s for s in (service, reference) if s is not None]
        self.dead: str | None = None
        # A shell makes its background commands ignore Ctrl-C; uvicorn would override that.
        self._ignores_interrupt = signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGINT or not self._ignores_interrupt:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        for state in (each.engine.health() for each in self._services):
            if state.dead:
                self.dead = state.detail
                return True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self._announce(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()

    async def _cut_off(self) -> None:
        """End what still runs when a shutdown has waited long enough."""
        seconds = self._service.limits.drain_seconds
        await asyncio.sleep(seconds)
        running = sum(each.gate.open for each in self._services)
        if running:
            _log(f"cut off after --drain-timeout {seconds:g} s: {running} sequences")
        for each in self._services:
            each.stopping = True
            await each.engine.close()

    def _announce(self, sockets: Sequence[socket.socket]) -> None:
        host, port = sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if self._binding.root_path:
            _log(f"a reverse proxy is expected to serve it under {self._binding.root_path}")
        _log(f"{self._service.model} at {address}/v1, engine {self._service.engine.name}")
        if self._service.computing:
            _log(f"computing in {self._service.computing}")
        if self._binding.ui:
            _log(f"chat page at {address}{UI_PATH}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
