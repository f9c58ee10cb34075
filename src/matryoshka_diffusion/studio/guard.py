"""Checks before every request: the host, the token, the page's origin. And headers after it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from matryoshka_diffusion.studio.requests import Refused, error_of

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names of this machine in the header Host."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Headers of every response."""


class Guard:
    """An ASGI application that lets requests of its own page through, and no others.

    No cookie is set or read, so another site's page cannot act for a visitor of this one. Without a
    token only names of this machine are answered to, so a name that an attacker's DNS leads here
    (rebinding) is refused.
    """

    def __init__(self, app: App, token: str | None = None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        try:
            self._check(scope)
        except Refused as error:
            await answer(send_guarded, error.status, error_of(str(error), error.field))
        else:
            await self._app(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        """Raise `Refused` for a request of another site's page, or without the token."""
        pairs = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        headers = dict(pairs)
        host = headers.get("host", "")
        if self._token is None and _without_port(host) not in LOOPBACK:
            raise Refused(403, "this name is not the studio's: open it at 127.0.0.1")
        if not scope["path"].startswith("/api/"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "this request comes from a page of another site")
        if site not in ("same-origin", "none"):
            raise Refused(403, "this request comes from a page of another site")
        given = headers.get("authorization", "")
        if self._token is not None and not secrets.compare_digest(
            given.encode(), f"Bearer {self._token}".encode()
        ):
            raise Refused(401, "the token is missing or wrong: open the address that was printed")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refused(415, "send the content type application/json")


def _without_port(host: str) -> str:
    """The name in a header Host; an IPv6 address keeps its brackets."""
    name, _, port = host.rpartition(":")
    return name.lower() if name and port.isdecimal() else host.lower()


async def answer(send: Send, status: int, content: Any) -> None:
    """Send JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
