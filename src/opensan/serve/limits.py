"""Limits on requests, and the responses to requests beyond them."""

import asyncio
import base64
import binascii
import hmac
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensan.errors import UserError

JSON_BYTES = 1 << 20
"""Bytes of a request without an image."""

LEFT = 499
"""Status of requests whose client left; it is not sent, only counted."""

UPLOADS = frozenset({"/v1/encodings", "/v1/segmentation", "/predict", "/webhook"})
"""Paths that accept images, or, from Label Studio, tasks with images or with masks."""

OPEN = frozenset({"/healthz", "/readyz"})
"""The only paths that need no token and work under any host name and while the service stops."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ServiceLimits:
    """Limits on requests. Together they bound the memory of the service."""

    request_bytes: int = 20 << 20
    """Bytes of one request with an image."""
    upload_bytes: int = 256 << 20
    """Bytes of all request bodies that are held at a time."""
    pixels: int = 25_000_000
    """Pixels of an image, checked before it is decoded."""
    side: int = 65_535
    """Pixels of an image's longer side, as many as in JPEG: data for each column or row is large."""
    words: int = 512
    """Words of a request; synonyms and background words count."""
    characters: int = 20_000
    """Characters of all words, prompts and templates of a request."""
    templates: int = 32
    """Templates of a request."""
    waiting: int = 16
    """Images accepted and not yet encoded."""
    questions: int = 64
    """Requests with words accepted and not yet answered."""
    queue_seconds: float = 30.0
    """Longest time in seconds from the acceptance of a request to its answer."""
    client_seconds: float = 20.0
    """Longest time in seconds for a client to send a request, and to read the response."""
    connections: int = 512
    """Open connections; more are closed at once. Many systems allow a process 1,024 files, sockets included."""
    cache_entries: int = 64
    """Number of encodings kept."""
    cache_bytes: int = 1 << 30
    """Bytes of the encodings kept."""
    cache_seconds: float = 900.0
    """Seconds that an encoding is kept after its last use."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:  # false for nan too
                raise UserError(f"{name} {value} is no limit: it must be a number above 0")


class Problem(HTTPException):
    """A refusal, sent as `application/problem+json` (RFC 9457)."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, " ".join(detail.split()), dict(headers or {}))


def busy(detail: str, seconds: float) -> Problem:
    """Return the refusal 429: the request is valid, and may be sent again after `seconds`."""
    return Problem(429, detail, {"Retry-After": str(max(1, math.ceil(seconds)))})


def stopping() -> Problem:
    """Return the refusal 503: another instance may answer."""
    return Problem(503, "the service is stopping", {"Retry-After": "5"})


def problem_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response for a refusal."""
    title = "Client Closed Request" if status == LEFT else HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


class Gate:
    """Refuses requests without permission, and limits the size and the transfer time of the others.

    Once `closing` is set, new requests are refused with 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServiceLimits,
        token: str | None = None,
        hosts: Collection[str] | None = None,
        same_origin: bool = False,
        basic: bool = False,
    ) -> None:
        """See `opensan.serve.create_app` for the arguments."""
        self.app = app
        self.closing = False
        self._limits = limits
        self._inside: set[_Body] = set()
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._same_origin = same_origin
        self._basic = basic
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
        """Return whether all accepted requests are answered. While closing, it stops clients that are still sending."""
        if self.closing:
            for body in self._inside:
                body.give_up()
        return not self._inside

    def take(self, size: int) -> None:
        """Count bytes of a body that are now held. Raises Problem if all bodies together are too large."""
        self._held += size
        if self._held > self._limits.upload_bytes:
            raise busy("too many uploads at a time", 1)

    def _check(self, scope: Scope) -> None:
        if self.closing:
            raise stopping()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise Problem(
                421, f"this service is not called {_name(host)[:100]!r}; it is {', '.join(sorted(self._hosts))}"
            )
        if self._same_origin:
            _check_origin(scope["method"], headers, host)
        if self._token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Always compared, so that the time reveals nothing.
            if basic := self._basic and scheme.lower() == b"basic":
                given = _password(given)
            right = hmac.compare_digest(given.strip(), self._token)
            if not (basic or scheme.lower() == b"bearer") or not right:
                raise Problem(401, "this service needs a bearer token", {"WWW-Authenticate": "Bearer"})
        if _CONTROL.search(scope["path"]):  # a route's pattern ignores a final newline
            raise Problem(404, "there is no such path: it holds a control character")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise Problem(415, "a body must come as it is, without Content-Encoding", {"Accept-Encoding": "identity"})
        length = headers.get(b"content-length", b"")
        if length and b"transfer-encoding" in headers:  # a proxy may have used the other one (RFC 9112, section 6.1)
            raise Problem(400, "Content-Length and Transfer-Encoding contradict each other", {"Connection": "close"})
        if length.isdigit() and int(length) > self._allowed(scope):
            raise _too_long(self._allowed(scope))

    def _allowed(self, scope: Scope) -> int:
        return self._limits.request_bytes if scope["path"] in UPLOADS else JSON_BYTES


class _Body:
    """Reads one request's body within its limits of size and time."""

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
        """Stop waiting for the client."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def receive(self) -> Message:
        if self._complete:  # the next event is that the client left
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
        if message["type"] == "http.disconnect":
            raise Problem(LEFT, "the client left before its request was complete")
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.size += size
            self._gate.take(size)
            if self.size > self._allowed:
                raise _too_long(self._allowed)
            self._complete = not message.get("more_body", False)
        return message


def _password(credentials: bytes) -> bytes:
    """Return the password of basic authentication (RFC 7617), which Label Studio sends; b"" if there is none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _name(host: str) -> str:
    """Return the host of "host:port", in lower case: "[::1]:80" is "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _check_origin(method: str, headers: Mapping[bytes, bytes], host: str) -> None:
    """Raise Problem (403) for requests of another web page in the user's browser; programs send no such headers.

    A link from another page to this one is no harm: the other page cannot read what it opens.
    """
    origin = headers.get(b"origin")
    site = headers.get(b"sec-fetch-site", b"none").decode("latin-1").strip().lower()
    link = method in ("GET", "HEAD") and headers.get(b"sec-fetch-mode") == b"navigate"
    foreign_origin = origin is not None and origin.decode("latin-1").strip().lower() != f"http://{host.lower()}"
    if foreign_origin or (site not in ("none", "same-origin") and not link):
        raise Problem(403, "only the page of this service may ask it from a browser")


def _too_long(allowed: int) -> Problem:
    return Problem(413, f"the request is longer than {allowed:,} bytes")
