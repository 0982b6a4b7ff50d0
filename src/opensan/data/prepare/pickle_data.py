"""Read the plain data in a pickle from outside without unpickling: no code that the file names is imported or called.

The file is read as a list of instructions. Those that make dicts, lists, strings and numbers are
followed; those that would import or call something (as for a numpy array) make a placeholder.
"""

import mmap
import pickletools
from pathlib import Path
from typing import IO, Any, cast

from opensan.errors import UserError, reason

_HARMLESS = {"numpy", "_codecs"}
"""Modules that data files name to make arrays. A file that names any other module was not written as data."""
_IGNORED = {"PROTO", "FRAME", "STOP"}
_ARGUMENTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Instructions that push their own argument."""
_MARK = object()
_MADE = {
    "MARK": lambda: _MARK,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
"""Instructions that push a new object."""


class Placeholder:
    """Replaces an object that a pickle would have made by a call."""


_PLACEHOLDER = Placeholder()


def read_pickle_data(path: Path) -> Any:
    """Return the content of a pickle, with a `Placeholder` for each object that is not plain data.

    Raises UserError, one line, on a damaged file, and on one that names code that data does not need.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # Mapped, so that a false length in the file can't make more be read than the file holds.
            return _follow(content)
    except _Refused as error:
        raise UserError(f"{path}: refused: it asks for {error}; nothing of it was run") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can fail in any way: IndexError, TypeError, UnicodeDecodeError, ...
        raise UserError(f"{path}: not a readable pickle ({reason(error)})") from None


class _Refused(Exception):
    """Raised with the module and name that a pickle asks for."""


def _follow(content: mmap.mmap) -> Any:
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], content)):  # it is read like a file
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The instructions' stack and memo. An instruction that this does not know raises."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _IGNORED:
            return
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("APPEND", "SETITEM"):
            self._add(name, [stack.pop() for _ in range(1 + (name == "SETITEM"))][::-1])
        elif name in ("APPENDS", "SETITEMS"):
            self._add(name, self._since_mark())
        elif name in ("LIST", "TUPLE", "DICT"):
            items = self._since_mark()
            stack.append(_pairs(items) if name == "DICT" else tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name_code(argument.split(" ", 1) if argument else [stack.pop(), stack.pop()][::-1])
        elif name in ("REDUCE", "NEWOBJ", "BUILD"):
            stack.pop()  # the arguments or the state
            stack[-1] = _PLACEHOLDER
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        else:
            raise UserError(f"unexpected instruction {name}")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _add(self, name: str, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if name.startswith("APPEND"):
            target.extend(items)
        else:
            target.update(_pairs(items))

    def _name_code(self, names: list[Any]) -> None:
        module, name = names
        if str(module).split(".")[0] not in _HARMLESS:
            raise _Refused(f"{module}.{name}"[:80])
        self.stack.append(_PLACEHOLDER)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
