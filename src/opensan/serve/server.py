"""Extend uvicorn: disconnect clients that stall, and finish accepted requests before a stop."""

import asyncio
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from opensan.errors import UserError
from opensan.serve.app import Application
from opensan.serve.limits import ServiceLimits

BACKLOG = 64
"""Connections that the event loop accepts in one step, before any of them is counted."""


def run(app: Application, listener: socket.socket, started: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, finish accepted requests, and return the signal's number.

    `started` is told the service's URL once it answers.
    """
    server = Server(app, lambda: started(url_of(listener)))
    be_quiet()
    server.run(sockets=[listener])
    return server.stopped_by


def be_quiet() -> None:
    """Keep this process's log free of what clients' requests are odd in."""
    # Warnings about words that the model has never seen do not belong in the log.
    warnings.filterwarnings("ignore", message="the model has never seen")
    # Nor do those about words that a calibration was not fitted with, which the answers tell.
    warnings.filterwarnings("ignore", message="the calibration was fitted")
    # Nor do those about odd images or forms, or clients could let the log grow without bound.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address at which `run` will listen, before a model is loaded; port 0 chooses a free one.

    Raises ValueError, one line, if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it would let two services share one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host} port {port} ({error.strerror or error})") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Server that, on a signal, refuses new requests with 503 until accepted ones are answered, and then ends."""

    def __init__(self, app: Application, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=_protocol(app.service.limits),
            backlog=BACKLOG,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,  # to send responses: all are ready before this begins
        )
        super().__init__(config)
        self.stopped_by = 0
        self._ready = ready
        self._gate = app.gate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start uvicorn, then report that the service is ready."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal; a second Ctrl-C ends at once."""
        if self.stopped_by and sig == signal.SIGINT:
            self.force_exit = self.should_exit = True
        self.stopped_by = sig
        self._gate.closing = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: once closing, when all accepted requests are answered."""
        if self._gate.closing and self._gate.empty():
            return True
        return await super().on_tick(counter)


def _protocol(limits: ServiceLimits) -> type[H11Protocol]:
    seconds = limits.client_seconds
    connections = 0

    class Impatient(H11Protocol):
        """Disconnects a client that for `seconds` does not send its request or read its response.

        The time that a body takes is bounded elsewhere, where it can be answered; only the rest of one that was
        refused is bounded here. It is read, because closing on it would cost the client the answer.
        """

        _request: asyncio.TimerHandle | None = None
        _answer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            nonlocal connections
            connections += 1
            super().connection_made(transport)
            if connections > limits.connections:
                transport.abort()
            self._request = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            in_headers = self.conn.their_state is h11.IDLE
            in_refused_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
            if not in_headers and not in_refused_body:
                self._cancel(self._request)
                self._request = None
            elif self._request is None:
                self._request = self.loop.call_later(seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel(self._answer)

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal connections
            connections -= 1
            super().connection_lost(exc)
            self._cancel(self._request)
            self._cancel(self._answer)

        def _cancel(self, timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Impatient
