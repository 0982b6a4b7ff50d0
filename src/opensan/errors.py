"""Errors that users can meet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Tells a user, in one line, what was wrong, where, and what would be right.

    Only such an error is shown without a traceback by the commands, and answered with a 4xx status by the service. Any
    other exception is a fault of the package.
    """


class HubError(UserError, ConnectionError):
    """Tells that a hub did not give a file, what was tried, and what works without it."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Make an OSError of the block, which does nothing but write to `path`, a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot write there ({error.strerror or error})") from error
