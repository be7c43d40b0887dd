"""Who may ask: hosts, origins and keys, checked before anything of a request is read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orthrus_fast.errors import RequestError

KEY_VARIABLE = "ORTHRUS_API_KEY"
App = Callable[[dict[str, Any], Any, Any], Any]  # of ASGI
OPEN = ("/", "/health")  # paths that need no key: they tell nothing
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(file: str | None) -> tuple[str, ...]:
    """Return the keys that open the server: those of a file, or that of the environment."""
    if file is None:
        return tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise RequestError(f"--api-key-file {file}: {why}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise RequestError(f"--api-key-file {file}: no key in it")
    return keys


@dataclass(frozen=True)
class Access:
    """``keys`` that open the server, none of which leaves it open; ``hosts`` it answers to.

    ``hosts`` empty: all of them. Raises RequestError for a server that others reach without a key.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise RequestError(
                f"--host {self.host}: others reach the server there, so it needs a key: set "
                "ORTHRUS_API_KEY in its environment, or give --api-key-file"
            )
        for key in self.keys:
            if not re.fullmatch(r"[!-~]{16,}", key):
                raise RequestError(
                    "API key: at least 16 characters, of ASCII's printable ones without spaces"
                )

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """The status and the message for a request that is refused; None for one that is not."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = re.sub(r":\d+$", "", host)
        known = [name.lower() for name in self.hosts]
        known += [*LOCAL, self.host.lower()] if is_loopback(self.host) else []
        if known and name not in known:
            return 403, f"Host: {name[:100]!r} is no name of this server; --allowed-host adds one"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            return 403, "Origin: a page of another site may not use this server"
        if self.keys and path not in OPEN and self.key_of(headers) is None:
            return 401, "Authorization: Bearer with a key of this server is needed"
        return None

    def key_of(self, headers: dict[bytes, bytes]) -> str | None:
        """The key that a request brought, if it is one of the server's."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        right = [key for key in self.keys if hmac.compare_digest(key.encode(), given.strip())]
        return right[0] if right else None


class Guard:
    """An ASGI application before another one: refuses what ``access`` refuses, adds headers.

    ``answered`` is called with the path and the status of every response.
    """

    def __init__(self, app: App, access: Access, answered: Callable[[str, int], None]) -> None:
        self._app, self._access, self._answered = app, access, answered

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One request, or the start and the end of the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._answered(scope["path"], message["status"])
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._access.refusal(scope["path"], headers)
        if refusal is None:
            scope["orthrus_key"] = self._access.key_of(headers) or ""
            await self._app(scope, receive, sending)
            return
        content = json.dumps(error_object(*refusal)).encode()
        kind = [(b"content-type", b"application/json"), (b"connection", b"close")]
        kind += [(b"www-authenticate", b"Bearer")] if refusal[0] == 401 else []
        await sending({"type": "http.response.start", "status": refusal[0], "headers": kind})
        await sending({"type": "http.response.body", "body": content})


def error_object(
    status: int, message: str, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def policy_of(page: str) -> str:
    """The content security policy of a page: its own script and style, this server, no more."""
    hashes = {}
    for tag in ("script", "style"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()) for part in parts)
        hashes[tag] = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
