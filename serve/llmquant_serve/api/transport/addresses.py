"""Which route a request means, and where its page came from, behind a reverse proxy or not.

A proxy may serve this server under a prefix. The prefix is ``--root-path``, or what a trusted proxy
writes into X-Forwarded-Prefix; whether the proxy has taken it off the path or not makes no
difference. Addresses differ in ways that mean nothing: a slash at the end, two slashes where a
client joined two texts.

Any page on the web can make a browser post to this machine. A browser says so (Sec-Fetch-Site,
Origin), other programs send neither; what comes from another origin's page is refused unless
``--cors-origin`` allows it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

_PREFIX = re.compile(r"(/[A-Za-z0-9._~%-]+)+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
THIS_MACHINE = ("127.0.0.1", "::1")
PEER = "llmquant.peer"  # in a scope: who is connected, where ``client`` is what a proxy said


def is_prefix(path: str) -> bool:
    """Whether a text can stand before all paths: ``/llm``, ``/team/llm``."""
    return _PREFIX.fullmatch(path) is not None


def is_origin(text: str) -> bool:
    """Whether a browser can send a text as an origin (``https://host:port``); ``*`` is all."""
    return text in ("*", "null") or _ORIGIN.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where this server is, for its clients.

    Attributes:
        root_path: the prefix of all paths; empty for none.
        proxies: addresses and networks whose X-Forwarded headers are believed.
        origins: of other pages that may post here; ``*`` is every page.
        page: the path of the chat page, whose addresses are left as they are.
    """

    root_path: str = ""
    proxies: Sequence[str] = THIS_MACHINE
    origins: Sequence[str] = ()
    page: str | None = None

    def on_page(self, path: str) -> bool:
        """Whether a path belongs to the chat page."""
        return self.page is not None and f"{path}/".startswith(f"{self.page}/")

    def resolved(self, scope: Scope) -> tuple[Scope, str]:
        """The request as the routes should see it, and its path without the prefix."""
        prefix = self.root_path
        forwarded = Headers(scope=scope).get("x-forwarded-prefix", "").split(",")[0].strip()
        if is_prefix(forwarded.rstrip("/")) and self._is_trusted(scope):
            prefix = forwarded.rstrip("/")
        path: str = scope["path"]
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            path = path[len(prefix) :] or "/"
        if not self.on_page(path):
            path = re.sub("/{2,}", "/", path)
            path = path.rstrip("/") or "/"
        whole = prefix + path
        changes = {"root_path": prefix, "path": whole, "raw_path": whole.encode()}
        return {**scope, **changes}, path

    def foreign_origin(self, scope: Scope) -> str | None:
        """The other origin whose page made this request; None where it is no other's."""
        headers = Headers(scope=scope)
        origin, site = headers.get("origin", ""), headers.get("sec-fetch-site", "")
        if "*" in self.origins or (origin and origin in self.origins):
            return None
        if site:
            return None if site in ("same-origin", "none") else origin or f"a {site} page"
        hosts = {headers.get("host", "")}
        if self._is_trusted(scope):
            hosts |= {h.strip() for h in headers.get("x-forwarded-host", "").split(",")}
        return None if not origin or _authority(origin) in hosts - {""} else origin

    def _is_trusted(self, scope: Scope) -> bool:
        peer = scope.get(PEER) or scope.get("client")
        return peer is not None and peer[0] in _believed(tuple(self.proxies)).trusted_hosts


def believing(app: ASGIApp, proxies: Sequence[str]) -> ASGIApp:
    """An application that knows its clients by what trusted proxies say of them."""
    inner = ProxyHeadersMiddleware(app, trusted_hosts=list(proxies))  # type: ignore[arg-type]

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        scope[PEER] = scope.get("client")
        await inner(scope, receive, send)  # type: ignore[arg-type]

    return outer


def _authority(origin: str) -> str:
    return urlsplit(origin).netloc


@functools.cache
def _believed(proxies: tuple[str, ...]) -> ProxyHeadersMiddleware:
    """uvicorn's own reading of a list of addresses and networks."""

    async def nothing(*_: object) -> None:
        return None

    return ProxyHeadersMiddleware(nothing, trusted_hosts=list(proxies))
