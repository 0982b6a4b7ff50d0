"""What a client may ask of the service, and how it is told that it may not."""

import asyncio
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON_BYTES = 1 << 20
"""Of a request without a photograph."""

UPLOADS = frozenset({"/v1/encodings", "/v1/segmentation"})
"""Paths that take photographs."""

OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that answer without a token, and while the service stops."""


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds on what clients may ask. All of them together bound the memory of the service."""

    request_bytes: int = 20 << 20
    """Of one request with a photograph."""
    upload_bytes: int = 256 << 20
    """Of all request bodies that are held at a time."""
    pixels: int = 25_000_000
    """Of a photograph, known before it is decoded."""
    side: int = 65_535
    """Pixels of its longer side: as many as JPEG can have. What is computed for each column or row is large."""
    words: int = 512
    """Of a question; synonyms and background words count."""
    characters: int = 20_000
    """Of all words, prompts and templates of a question."""
    templates: int = 32
    """Of a question."""
    waiting: int = 16
    """Photographs accepted and not yet encoded."""
    questions: int = 64
    """Word questions accepted and not yet answered."""
    queue_seconds: float = 30.0
    """Longest time from the acceptance of a photograph or a question to its answer."""
    client_seconds: float = 20.0
    """Longest time for a client to send a request, and to read what it was sent."""
    connections: int = 512
    """Open at a time; more are closed at once. A process may often have 1,024 files, sockets among them."""
    cache_entries: int = 64
    """Encodings kept."""
    cache_bytes: int = 1 << 30
    """Of the encodings kept."""
    cache_seconds: float = 900.0
    """An encoding is kept so long after its last use."""


class Problem(HTTPException):
    """A refusal, told as `application/problem+json` (RFC 9457)."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, " ".join(detail.split()), dict(headers or {}))


def busy(detail: str, seconds: float) -> Problem:
    """429: nothing is wrong with the request, and it may be sent again after `seconds`."""
    return Problem(429, detail, {"Retry-After": str(max(1, math.ceil(seconds)))})


def stopping() -> Problem:
    """503: another instance may answer."""
    return Problem(503, "the service is stopping", {"Retry-After": "5"})


def problem_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that tells a refusal."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Client Closed Request"
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


class Gate:
    """Stands before the application: who may enter, how much they may bring, and how long they may take to do it.

    Once `closing` is set, new requests are refused with 503.
    """

    def __init__(self, app: ASGIApp, limits: ServiceLimits, token: str | None = None) -> None:
        self.app = app
        self.closing = False
        self._limits = limits
        self._inside: set[_Body] = set()
        self._token = None if token is None else token.encode()
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Problem as problem:
            response = problem_response(problem.status_code, problem.detail, problem.headers)
            await response(scope, receive, send)
            return
        body = _Body(self, receive, self._allowed(scope), self._limits.client_seconds)
        self._inside.add(body)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self._inside.remove(body)
            self._held -= body.size

    def empty(self) -> bool:
        """Whether all that was accepted is answered. While closing, clients that still send are sent away."""
        if self.closing:
            for body in self._inside:
                body.give_up()
        return not self._inside

    def take(self, size: int) -> None:
        """Count bytes of a body that are now held. Raises Problem if they are too many together."""
        self._held += size
        if self._held > self._limits.upload_bytes:
            raise busy("too many uploads at a time", 1)

    def _check(self, scope: Scope) -> None:
        if self.closing:
            raise stopping()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._token is not None and (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Always compared, so that the time tells nothing.
            right = hmac.compare_digest(given.strip(), self._token)
            if scheme.lower() != b"bearer" or not right:
                raise Problem(401, "this service needs a bearer token", {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if length and b"transfer-encoding" in headers:  # a proxy may have read it the other way (RFC 9112, section 6.1)
            raise Problem(400, "Content-Length and Transfer-Encoding contradict each other", {"Connection": "close"})
        if length.isdigit() and int(length) > self._allowed(scope):
            raise _too_long(self._allowed(scope))

    def _allowed(self, scope: Scope) -> int:
        return self._limits.request_bytes if scope["path"] in UPLOADS else JSON_BYTES


class _Body:
    """Reads one request's body within its bounds of size and time."""

    def __init__(self, gate: Gate, receive: Receive, allowed: int, seconds: float) -> None:
        self.size = 0
        self._gate = gate
        self._receive = receive
        self._allowed = allowed
        self._seconds = seconds
        self._deadline: float | None = None
        self._complete = False
        self._timeout: asyncio.Timeout | None = None

    def give_up(self) -> None:
        """Wait no longer, if the client is being waited for."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def receive(self) -> Message:
        if self._complete:  # what comes now is that the client left
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            if self._gate.closing:
                raise stopping() from None
            raise Problem(408, f"the request was not complete after {self._seconds:g} s") from None
        finally:
            self._timeout = None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.size += size
            self._gate.take(size)
            if self.size > self._allowed:
                raise _too_long(self._allowed)
            self._complete = not message.get("more_body", False)
        return message


def _too_long(allowed: int) -> Problem:
    return Problem(413, f"the request is longer than {allowed:,} bytes")
