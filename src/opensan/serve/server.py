"""uvicorn, with what it lacks: clients that stall are let go, and a stop finishes what was accepted."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from opensan.serve.app import Application


def run(app: Application, host: str, port: int, started: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, finish what was accepted, and return the signal's number.

    `started` is told the service's URL once it answers; port 0 chooses a free one. Raises ValueError, one line, if
    it is not possible to listen there.
    """
    listener = _listen(host, port)
    seconds = app.service.limits.client_seconds
    config = uvicorn.Config(
        app,
        http=_protocol(seconds),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(app.service.limits.queue_seconds + seconds),
    )
    server = _Server(config, app, lambda: started(_url(listener)))
    server.run(sockets=[listener])
    return server.stopped_by


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        raise ValueError(f"cannot listen at {host} port {port} ({error.strerror or error})") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """On a signal, new requests are refused with 503 until those accepted are answered; then it ends."""

    def __init__(self, config: uvicorn.Config, app: Application, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.stopped_by = 0
        self._ready = ready
        self._gate = app.gate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stopped_by and sig == signal.SIGINT:
            self.force_exit = self.should_exit = True
        self.stopped_by = sig
        self._gate.closing = True

    async def on_tick(self, counter: int) -> bool:
        if self._gate.closing and self._gate.active == 0:
            return True
        return await super().on_tick(counter)


def _protocol(seconds: float) -> type[H11Protocol]:
    class Impatient(H11Protocol):
        """Lets go of a client that does not say what it wants, or does not read what it gets, for `seconds`.

        The time that a body takes is bounded elsewhere, where it can be answered.
        """

        _headers: asyncio.TimerHandle | None = None
        _answer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._headers = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.conn.their_state is h11.IDLE
            if waiting and self._headers is None:
                self._headers = self.loop.call_later(seconds, self.transport.abort)
            elif not waiting and self._headers is not None:
                self._headers.cancel()
                self._headers = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answer is not None:
                self._answer.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._headers, self._answer):
                if timer is not None:
                    timer.cancel()

    return Impatient
