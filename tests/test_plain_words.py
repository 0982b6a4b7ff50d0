"""Docstrings begin with a sentence in plain words, and everything public has one."""

import ast
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "src" / "opensan"
ROOMS = sorted({path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")})
"""The modules and packages of the root."""

RIDDLES = re.compile(r"(What|As|Of|Nothing|In|Inside|Like|Where|That|Those|Who|Whatever|Also)\b")
"""Openings that leave the reader without a subject."""

NOT_A_VERB = re.compile(
    r"(The|A|An|All|Each|Every|One|Whether|How|Which|Why|It|This|These|Its|No|With|Without|For|Up|At|By|On|From|To|So|Not)\b"
    r"|[^A-Z]"
)
"""Openings of a function's docstring that are no imperative."""


class Documented(NamedTuple):
    """A module, class, function or attribute with its docstring."""

    where: str
    name: str
    kind: str
    text: str | None


def documented(path: Path) -> Iterator[Documented]:
    """Yield everything in a file that can have a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    source = str(path.relative_to(ROOT))
    if tree.body:  # an empty __init__.py needs none
        yield Documented(f"{source}:1", path.stem, "module", ast.get_docstring(tree))
    yield from _members(tree, source, "")


def _members(parent: ast.Module | ast.ClassDef, source: str, prefix: str) -> Iterator[Documented]:
    for node, following in zip_longest(parent.body, parent.body[1:]):
        where = f"{source}:{node.lineno}"
        if isinstance(node, ast.ClassDef):
            yield Documented(where, prefix + node.name, "class", ast.get_docstring(node))
            yield from _members(node, source, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
            if "overload" not in decorators:
                kind = "property" if decorators & {"property", "cached_property"} else "function"
                yield Documented(where, prefix + node.name, kind, ast.get_docstring(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            text = getattr(following.value, "value", None)
            if isinstance(text, str):
                yield Documented(where, prefix + ast.unparse(node).split()[0], "attribute", text)


def of_room(room: str) -> list[Documented]:
    """Return everything documented in a module or package of the root."""
    path = ROOT / room
    return [entry for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))) for entry in documented(file)]


def problem(entry: Documented) -> str | None:
    """Return how the docstring's first line breaks the rules, if it does."""
    first = (entry.text or "").strip().split("\n")[0]
    imperative = entry.kind == "function" and entry.name.split(".")[-1] not in ("__init__", "forward")
    if not first:
        return None
    if RIDDLES.match(first):
        return "begins without a subject or verb"
    if imperative and NOT_A_VERB.match(first):
        return "does not begin with a verb"
    if entry.kind != "attribute" and not first.endswith((".", ":")):
        return "has a first line that does not end a sentence"
    return None


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_a_sentence(room):
    checked = [(entry, problem(entry)) for entry in of_room(room)]
    assert not [f"{entry.where}: {entry.name} {reason}: {entry.text}" for entry, reason in checked if reason]


def test_everything_public_has_a_docstring():
    """A method may go without where another class documents it: a protocol, or the base class."""
    entries = [entry for room in ROOMS for entry in of_room(room)]
    described = {entry.name.split(".")[-1] for entry in entries if entry.text and "." in entry.name}
    missing = [
        f"{entry.where}: {entry.name}"
        for entry in entries
        if not entry.text
        and not any(part.startswith("_") for part in entry.name.split("."))
        and not ("." in entry.name and entry.name.split(".")[-1] in described)
    ]
    assert not missing, "\n".join(missing)
