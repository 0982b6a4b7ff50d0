"""Work for a client, ended when the client leaves."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from fastapi import Request

from opensan.serve.limits import LEFT, Problem

Answer = TypeVar("Answer")


async def while_there(request: Request, work: Awaitable[Answer]) -> Answer:
    """Await `work`, and cancel it when the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(LEFT, "the client left")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
