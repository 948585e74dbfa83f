"""What every request passes before and after its route: the key, the bounds on bodies, the metrics."""

import hmac
import json
import time
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_jax.serving.metrics import Metrics
from retrieval_jax.serving.settings import ServeSettings

OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json")  # need no key
MAX_BODIES = 64 << 20  # bytes of all bodies that are being read
DISCARDED = 16 << 20  # bytes of a refused body that are read, or its client would not see why
CLOSE = {"connection": "close"}
NO_KEY = b'{"error":"the API key is missing or wrong: send X-API-Key, or a Bearer token"}'


class Gate:
    """ASGI middleware around the app.

    Args:
      app: the app.
      settings: the API key, and the largest body.
      metrics: counts requests by route and status.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self._key = settings.api_key.encode() if settings.api_key else None
        self._too_large = (
            413,
            f"the body is larger than {settings.max_payload_bytes:,} bytes: send less at a time",
            CLOSE,
        )
        self._bodies = 0  # bytes of all bodies that are being read
        self._observers: dict[tuple[str, int], tuple] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, or passes on what is no request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, body = time.perf_counter(), 500, _Body(self, receive)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            if self._key and scope["path"] not in OPEN and not self._has_key(headers):
                await send_json(send_on, 401, NO_KEY, {"www-authenticate": "Bearer"})
            elif length.isdigit() and int(length) > self.settings.max_payload_bytes:
                await body.discard()
                status, error, headers = self._too_large
                await send_json(send_on, status, json.dumps({"error": error}).encode(), headers)
            else:
                await self.app(scope, body.receive, send_on)
        finally:
            self._bodies -= body.length
            self._observe(scope, status, time.perf_counter() - began)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"x-api-key")
        if given is None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = token.strip() if scheme.lower() == b"bearer" else b""
        return hmac.compare_digest(given, self._key)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        key = getattr(scope.get("route"), "path", "other"), status
        if key not in self._observers:
            self._observers[key] = (
                self.metrics.requests.labels(key[0], str(status)).inc,
                self.metrics.seconds.labels(key[0]).observe,
            )
        count, observe = self._observers[key]
        count()
        observe(seconds)

    async def read(self, body: "_Body", message: Message) -> None:
        """Counts a part of a body. Raises HTTPException if this body, or all together, are too large."""
        size = len(message.get("body", b""))
        body.length += size
        self._bodies += size
        if body.length > self.settings.max_payload_bytes:
            if message.get("more_body"):
                await body.discard()
            raise HTTPException(*self._too_large)
        if self._bodies > MAX_BODIES:
            raise HTTPException(
                429, "too many large bodies at once: ask again", {"Retry-After": "1", **CLOSE}
            )


class _Body:
    """A request's body.

    Attributes:
      length: bytes that were read.
    """

    def __init__(self, gate: Gate, receive: Receive):
        self._gate, self._receive, self.length = gate, receive, 0

    async def receive(self) -> Message:
        """Reads the next part."""
        message = await self._receive()
        await self._gate.read(self, message)
        return message

    async def discard(self) -> None:
        """Reads on and keeps nothing, up to DISCARDED bytes."""
        read, more = 0, True
        while more and read < DISCARDED:
            message = await self._receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Sends a response."""
    raw = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
    raw += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
