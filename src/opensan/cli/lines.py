"""`opensan segment - --lines`: answer lines of JSON on stdin by lines of JSON on stdout."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from opensan.cli.asked_words import embed_words
from opensan.cli.options import listed_formats
from opensan.cli.terminal import SMALLER, UsageError, telling_of_memory
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.jobs.lines import LineQuestion
    from opensan.segmenters.base import Segmenter


def formats_of_lines(listed: Sequence[str] | None) -> list[str]:
    """Return the formats of --format, by default masks in the answers. Raises UsageError for those of no stream."""
    from opensan.jobs.lines import RLE, check_formats_of_lines

    formats = [RLE] if listed is None else listed_formats(listed)
    try:
        check_formats_of_lines(formats)
    except UserError as error:
        raise UsageError(f"--format: {error}") from None
    return list(dict.fromkeys(formats))


def answer_lines(segmenter: "Segmenter", question: "LineQuestion", *, rest: bool, batch: int) -> None:
    """Print an answer for each line on stdin, at once. Ends quietly when stdin ends, or nobody reads stdout.

    With `rest`, pixels that none of the words deserves are left unlabelled.
    """
    from opensan.jobs.lines import answers

    if question.vocabulary is not None:
        embed_words(segmenter, question.vocabulary)
    if rest:
        own = question.parse
        question = replace(
            question,
            parse=lambda words: segmenter.with_rest(own(words)),
            vocabulary=question.vocabulary and segmenter.with_rest(question.vocabulary),
        )
    try:
        with (
            telling_of_memory(segmenter.device, SMALLER),
            closing(answers(segmenter, question, _stdin(), batch=batch)) as found,
        ):
            for answer in found:
                print(json.dumps(answer, allow_nan=False), flush=True)  # ASCII, whatever the locale
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that the interpreter, at its end, has nothing left to write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdin() -> BinaryIO:
    """Return stdin in a file object of its own.

    The thread that waits for a line holds the lock of its file, and the interpreter, at its end, waits for that of
    `sys.stdin`.
    """
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except OSError:
        return sys.stdin.buffer
