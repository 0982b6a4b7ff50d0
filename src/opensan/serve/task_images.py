"""Read the images of Label Studio's tasks: from the tasks themselves, or from the one Label Studio that is allowed.

A task names its image by an address, and whoever writes tasks could name any: the service asks no other host than the
one it was started with, follows no redirect to another, asks only for paths that hold files, and opens no file.
"""

import asyncio
import base64
import binascii
import json
import posixpath
import re
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException as HttpFailure
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from opensan.errors import UserError, reason, short
from opensan.serve.limits import Problem, ServiceLimits

_FILES = re.compile(r"/data/.+|/storage-data/.+|/(tasks|projects)/\d+/(resolve|presign)/?")
"""The paths at which Label Studio serves files."""

_DATA = re.compile(r"data:image/[\w.+-]+;base64,")
_AT_ONCE = 4
"""Images fetched at a time."""
_REFRESHED_SECONDS = 200
"""An access token lives for five minutes."""


class TaskImages:
    """The source of tasks' images."""

    def __init__(self, host: str, key: str | None = None, limits: ServiceLimits | None = None) -> None:
        """Allow one Label Studio.

        Args:
            host: its address, "http://localhost:8080", as tasks and browsers have it.
            key: an access token of a user there: a legacy token, or a personal access token. None: none is sent.
            limits: of which the bytes of an image and the seconds of a transfer are used.

        Raises:
            UserError: `host` is no such address.
        """
        self._limits = limits or ServiceLimits()
        self._base = _checked_base(host)
        self._key = key
        self._access: tuple[str, float] | None = None
        self._refreshing = threading.Lock()
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def read(self, address: Any) -> bytes:
        """Return the image file at `address`, a task's value: a data URI, a path of Label Studio, or its full address.

        Raises Problem: 422, one line, for any other address, and for what Label Studio does not give; 413 for a file
        that is too large.
        """
        if not isinstance(address, str) or not address:
            raise Problem(422, f"the image must be an address or a data URI, not {short(address)}")
        if address[:5].lower() == "data:":
            return self._decoded(address)
        url = self._allowed(address)
        async with self._at_once:
            return await asyncio.to_thread(self._fetch, url)

    def _decoded(self, address: str) -> bytes:
        head = _DATA.match(address[:100])
        if head is None:
            raise Problem(422, "a data URI must begin with data:image/...;base64,")
        if len(address) > self._limits.request_bytes * 4 // 3 + 100:
            raise self._too_large("the image in the task")
        try:
            return base64.b64decode(address[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Problem(422, "a data URI that is not base64") from None

    def _allowed(self, address: str) -> str:
        """Return the full address if it may be asked for. Raises Problem (422)."""
        if re.search(r"[\x00-\x20\x7f\\\\]", address) or not address.isascii():
            address = urllib.parse.quote(address, safe="/:?&=%+,;~()!*'#@$[]")
        root = self._base.path.rstrip("/")
        if address.startswith("/") and not address.startswith("//"):
            path = address if root and address.startswith(f"{root}/") else root + address
            address = urljoin(self._base.geturl(), path)
        try:
            parts = urlsplit(address)
            same = _origin(parts) == _origin(self._base)
        except ValueError:
            raise Problem(422, f"{short(address)} is no address") from None
        if not same or parts.username is not None or parts.password is not None:
            raise Problem(
                422,
                f"{short(address)} is not at {self._base.geturl()}, the only place that this service reads images from "
                "(--label-studio)",
            )
        path = unquote(parts.path)
        inside = path.startswith(f"{root}/") and posixpath.normpath(path) == path.rstrip("/")
        if not inside or not _FILES.fullmatch(path[len(root) :]):
            raise Problem(422, f"{short(address)} is no file of Label Studio: /data/... is")
        return parts._replace(fragment="").geturl()

    def _fetch(self, url: str) -> bytes:
        """Return what Label Studio has at `url`."""
        deadline = time.monotonic() + self._limits.client_seconds
        request = urllib.request.Request(url, headers=self._authorization(deadline))
        try:
            with self._opener().open(request, timeout=self._limits.client_seconds) as response:
                return self._content(response, deadline, short(url))
        except urllib.error.HTTPError as error:
            error.close()
            hint = ": set LABEL_STUDIO_API_KEY to a token of a user there" if error.code in (401, 403) else ""
            raise Problem(422, f"Label Studio answered {error.code} for {short(url)}{hint}") from None
        except (OSError, HttpFailure) as error:
            why = reason(getattr(error, "reason", None) or error)
            raise Problem(422, f"Label Studio does not give {short(url)} ({why})") from None

    def _content(self, response: Any, deadline: float, name: str) -> bytes:
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > self._limits.request_bytes:
                raise self._too_large(name)
            if time.monotonic() > deadline:
                raise Problem(422, f"Label Studio took more than {self._limits.client_seconds:g} s for {name}")
        return b"".join(parts)

    def _authorization(self, deadline: float) -> dict[str, str]:
        """Return the header that names the user. A personal access token is exchanged for a short-lived one."""
        if self._key is None:
            return {}
        if not self._key.startswith("eyJ"):  # a legacy token, which is no JSON
            return {"Authorization": f"Token {self._key}"}
        with self._refreshing:
            if self._access is None or time.monotonic() > self._access[1]:
                url = urljoin(self._base.geturl(), f"{self._base.path.rstrip('/')}/api/token/refresh")
                body = json.dumps({"refresh": self._key}).encode()
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                try:
                    with self._opener().open(request, timeout=self._limits.client_seconds) as response:
                        access = str(json.loads(self._content(response, deadline, "a token"))["access"])
                except (OSError, HttpFailure, ValueError, KeyError, TypeError):
                    raise Problem(422, "Label Studio does not take LABEL_STUDIO_API_KEY") from None
                self._access = access, time.monotonic() + _REFRESHED_SECONDS
            return {"Authorization": f"Bearer {self._access[0]}"}

    def _opener(self) -> urllib.request.OpenerDirector:
        return urllib.request.build_opener(_OnlyAllowed(self._allowed))

    def _too_large(self, name: str) -> Problem:
        return Problem(413, f"{name} is longer than {self._limits.request_bytes:,} bytes")


class _OnlyAllowed(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed addresses alone: a presigned address in a cloud storage is not one."""

    def __init__(self, allowed: Any) -> None:
        self._allowed = allowed

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        return super().redirect_request(req, fp, code, msg, headers, self._allowed(newurl))


def _checked_base(host: str) -> SplitResult:
    parts = urlsplit(host)
    try:
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # no number
        named = False
    if not named or "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(f"--label-studio {short(host)}: give Label Studio's address, such as http://localhost:8080")
    return parts


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme.lower(), parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme.lower())
