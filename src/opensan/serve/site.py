"""Serve the web page, static files of the package, at "/"."""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from opensan.files import ASSETS

_HEADERS = {
    # No other origins, no inline code; blob: is for data that the page itself makes.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # checked each time, so that page and service have the same version
}


class _Files(StaticFiles):
    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: MutableMapping[str, Any],
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page at "/", the package's pictures at "/scenes" and "/photographs"; to be called after all routes."""
    for pictures in ("scenes", "photographs"):
        app.mount(f"/{pictures}", _Files(directory=ASSETS / pictures))
    app.mount("/", _Files(directory=Path(__file__).parent / "page", html=True))
