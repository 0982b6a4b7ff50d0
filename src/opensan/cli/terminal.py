"""Helpers of all commands: one-line errors and warnings, progress bars, and consoles."""

import errno
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from opensan.errors import UserError
from opensan.files import json_text

if TYPE_CHECKING:
    from rich.console import Console

SMALLER = "a smaller --batch, or smaller images"
"""The remedy for a lack of memory."""

INTERRUPTED = 130
"""The exit code that shells give a command stopped by Ctrl-C."""


_OF_THE_MACHINE = frozenset(
    getattr(errno, name, None)  # not all systems have all
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "ENOMEM", "EMFILE", "ENFILE", "EIO", "ESTALE", "EPIPE"),
        *("EROFS", "EACCES", "EPERM", "ENAMETOOLONG"),
    )
) - {None}
"""System errors that a user can correct: a full disk, a file without permission. Others are faults of the package."""


class UsageError(UserError):
    """The command line contradicts itself: exit code 2."""


class Command(TyperCommand):
    """A command whose help shows its options in groups, by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group; options of no group, with --help, come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
        groups["Options"] = groups.pop("Options", [])
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Commands(TyperGroup):
    """Commands that turn Ctrl-C into an Abort for `reporting_errors`; typer from 0.29 on would exit silently.

    A command that has a message about it, such as how to continue, raises KeyboardInterrupt("...").
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command's first sentence, whole: typer cuts it at the width of the terminal."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str(limit=1000))
                    for name, command in commands.items()
                    if command and not command.hidden
                ]
            )

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn KeyboardInterrupt into an Abort with its text."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise typer.Abort(*interrupt.args) from None


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and an exit code; leave the traceback of any other exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal can't show must not stop the work
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
        try:
            yield
        except (KeyboardInterrupt, typer.Abort) as interrupt:
            complain(": ".join(["interrupted", *map(str, interrupt.args)]))
            sys.exit(INTERRUPTED)
        except UserError as error:
            complain(f"error: {error}")
            sys.exit(2 if isinstance(error, UsageError) else 1)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "opensan":
                raise
            complain(f"error: this needs {error.name}, which is missing: pip install . in a checkout of opensan")
            sys.exit(1)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
                complain(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
                sys.exit(1)
            # typer contains click since 0.26 and imported it before, so errors are recognised by their methods.
            if not hasattr(error, "format_message"):
                error.add_note("This is a fault of opensan, not of yours: please report it with the lines above.")
                raise
            command = getattr(getattr(error, "ctx", None), "command_path", "opensan")
            message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's word for it
            complain(f"error: {message} (see {command} --help)")
            sys.exit(getattr(error, "exit_code", 2))


@contextmanager
def telling_of_memory(device: object, remedy: str) -> Iterator[None]:
    """Turn a lack of memory, of the machine's or of torch's device, into a UserError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's
            raise
        raise UserError(f"out of memory on {device}: try {remedy}") from None


def print_json(data: Any, *, indent: int | None = 1) -> None:
    """Print plain data as JSON; a number that does not exist (nan) is null, as JSON has none."""
    print(json_text(data, indent=indent), flush=True)


def open_file(path: Path) -> None:
    """Open a result with the program that the system has for it; without one, say where the file is."""
    if typer.launch(str(path)) != 0:
        complain(f"warning: no program here opens {path}: look at it where you have one")


def complain(message: str) -> None:
    """Print one line on stderr."""
    print(" ".join(message.split()), file=sys.stderr)


def note(message: str) -> None:
    """Print a note on a terminal only; scripts that read stderr get errors and warnings."""
    if sys.stderr.isatty():
        complain(message)


def output_console() -> "Console":
    """Return the console of stdout, without markup, because a word may look like rich's markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(
    output: "Console", description: str, total: int | None, *, speed_of: str | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts finished items; a bar shows on a terminal, for more than one item.

    It goes among the output if that is on a terminal, else to stderr, so that neither overwrites the other. A `total`
    of None is one that nobody knows. `speed_of` "frames" has it show how many frames a second are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class SpeedColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} {speed_of}/s")

    console = output if output.is_terminal else Console(stderr=True)
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *([SpeedColumn()] if speed_of else []),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=total == 1 or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def progress_of(output: "Console", description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the number done and the total; a bar shows if that takes over a second."""
    started, shown = time.monotonic(), 0
    with ExitStack() as bar:
        advance: Callable[[int], None] | None = None

        def tell(done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None and time.monotonic() - started > 1:
                advance = bar.enter_context(progress_bar(output, description, total))
            if advance is not None:
                advance(done - shown)
                shown = done

        yield tell


@contextmanager
def progress_of_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of a step's name, the number done and the total; a terminal shows a bar with the time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total)
