"""Who may ask, and how much: API keys, the size of a body."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Iterable

from starlette.types import Message, Receive

from fastbert.serve.errors import BodyTooLarge, Unauthorized

# Answered without a key. The page asks for one itself.
PUBLIC = frozenset(
    {
        "/",
        "/health",
        "/live",
        "/ready",
        "/ping",
        "/docs",
        "/openapi.json",
        "/api-doc/openapi.json",
    }
)
METRICS = frozenset({"/metrics", "/stats"})


class Keys:
    """API keys. With none, everybody may ask."""

    def __init__(self, keys: Iterable[str], protect_metrics: bool = False) -> None:
        self._keys = [key.encode() for key in keys]
        self._public = {*PUBLIC, os.environ.get("AIP_HEALTH_ROUTE", "/health")} | (
            set() if protect_metrics else METRICS
        )

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, method: str, path: str, authorization: str | None, x_api_key: str | None) -> None:
        """Compare with every key, each in a time that does not tell how much of it was right.

        Raises:
            Unauthorized: no key, or none of ours.
        """
        if not self._keys or method == "OPTIONS" or (method in ("GET", "HEAD") and path in self._public):
            return
        given = x_api_key or ""
        if authorization is not None:
            scheme, _, value = authorization.partition(" ")
            given = value.strip() if scheme.lower() == "bearer" else ""
        if not given:
            raise Unauthorized("an API key is needed: send `Authorization: Bearer KEY`", headers=_CHALLENGE)
        raw = given.encode("latin-1")  # the bytes that were sent
        found = [hmac.compare_digest(raw, key) for key in self._keys]
        if not any(found):
            raise Unauthorized("the API key is not one of this server's", headers=_CHALLENGE)


_CHALLENGE = {"www-authenticate": "Bearer"}


async def read_body(receive: Receive, declared: str, limit: int) -> bytes:
    """The body, as long as it is within `limit` bytes; the connection watches over the time.

    Args:
        receive: of the ASGI request.
        declared: its `content-length`, or an empty string.

    Raises:
        BodyTooLarge: by its declared length, or as soon as more than the limit has come.
    """
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        body = message.get("body", b"")
        size += len(body)
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body", False):
            return body if not parts else b"".join([*parts, body])
        parts.append(body)


def _too_large(size: int, limit: int) -> BodyTooLarge:
    message = f"Failed to buffer the request body: length limit exceeded: {size} bytes of at most {limit}"
    return BodyTooLarge(message, headers={"connection": "close"})
