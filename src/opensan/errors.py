"""Errors that users can meet."""

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error that a user can correct; its message is one line: what was wrong, where, and what would be right.

    Only such an error is shown without a traceback by the commands, and answered with a 4xx status by the service. Any
    other exception is a fault of the package.
    """


class HubError(UserError, ConnectionError):
    """A hub did not provide a file; the message names the attempts, and what works without it."""


def short(value: object, most: int = 60) -> str:
    """Return `value` as Python writes it, on one line of at most `most` characters, for a message."""
    if isinstance(value, str):
        return repr(value if len(value) <= most else f"{value[: most - 3]}...")
    try:
        text = " ".join(_repr.repr(value).split())
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4,300 digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


_repr = reprlib.Repr()  # limited, because nested lists that share elements have a repr of unbounded size
_repr.maxlevel, _repr.maxstring, _repr.maxother = 3, 60, 60


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'car'?", with the name among `known` that is most like `name`; "" if none is like it."""
    lowered = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {short(lowered[near[0]])}?" if near else ""


def reason(error: BaseException, most: int = 200) -> str:
    """Return the message of another package's error, on one line of at most `most` characters."""
    said = str(getattr(error, "strerror", None) or error)
    line = next((" ".join(line.split()) for line in said.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def install(extra: str) -> str:
    """Return, for a message, what installs an optional part, an extra of the package.

    The package is on no index before its first release: what works is pip in a checkout of the repository.
    """
    return f"pip install '.[{extra}]' in a checkout of opensan"


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Make an OSError of the block, which does nothing but write to `path`, a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot write there ({error.strerror or error})") from error
