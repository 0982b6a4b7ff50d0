"""Label a stream of images: a line of JSON in, a line of JSON out, for those who have a scheduler of their own.

    {"id": "a7", "image": "photos/street.jpg"}  ->  {"line": 1, "id": "a7", "areas": {"road": 0.4, ...}, "masks": [...]}

A thread reads and decodes ahead; answers come in the order of the lines, and none waits for a line after it.
"""

import base64
import binascii
import json
import queue
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from opensan import outputs
from opensan.assemble.segments import USUAL_RULES, SegmentRules
from opensan.errors import UserError, reason, short
from opensan.files import check_regular
from opensan.jobs.folder import OF_THE_DISK
from opensan.jobs.ledger import NAME
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter
    from opensan.segmenters.results import Encoding, InputImage, Segmentation

RLE = "rle"
"""The format of masks in the answer itself, as COCO's run lengths."""

LONGEST_LINE = 1 << 27
"""Bytes of a line; longer ones are passed over, and answered with an error."""

_KEYS = ("image", "id", "words")
_DATA = re.compile(r"data:[^,]{0,200};base64,")


@dataclass(frozen=True)
class LineQuestion:
    """Settings of a stream."""

    parse: Callable[[Any], Vocabulary]
    """Returns the vocabulary of a line's own words; raises UserError for unusable words."""
    vocabulary: Vocabulary | None
    """Words of the lines that have none of their own; None if each line must have them."""
    out: Path
    """The folder for files."""
    formats: tuple[str, ...]
    """RLE, and names from `outputs.FORMATS`, whose files are named by the lines' ids."""
    rules: SegmentRules = USUAL_RULES
    threshold: float = 0.0
    """Pixels of less confidence are left unlabelled; in [0, 1]."""

    @property
    def of_files(self) -> list[str]:
        """The formats that are files."""
        return [name for name in self.formats if name != RLE]


@dataclass(frozen=True)
class _Line:
    """A line's question, with its image in memory."""

    about: dict[str, Any]
    """Entries that its answer repeats: the line's number, its id, and the image's path."""
    image: "InputImage"
    vocabulary: Vocabulary


class _BadLine(Exception):
    """A line that can't be answered; `args[0]` is what its answer repeats, `args[1]` the reason."""


def check_formats_of_lines(formats: Sequence[str]) -> None:
    """Raise UserError, one line, unless all `formats` suit a stream and there is at least one."""
    for name in formats:
        if name in outputs.DATASETS:
            raise UserError(f"{name} is a data set of all images, and a stream has no end")
    if not formats or any(name not in (RLE, *outputs.FORMATS) for name in formats):
        wrong = next((f"unknown output format {name!r}" for name in formats if name not in outputs.FORMATS), "none")
        raise UserError(f"{wrong}: choose from {', '.join((RLE, *outputs.FORMATS))}")


def answers(
    segmenter: "Segmenter", question: LineQuestion, lines: BinaryIO, *, batch: int = 1
) -> Generator[dict[str, Any]]:
    """Answer each line of a binary stream, in order, with plain data for a line of JSON.

    A line is {"image": a path, or "data:image/jpeg;base64,...", "id": text or a whole number, "words": as
    `Vocabulary.parse` takes them}; id and words may be left out. An answer has the line's number and id, and either
    "error", one line, or the words' shares of the image ("areas", "unlabelled"), the paths of "files", and "masks": for
    each word that occurs its COCO run lengths. Up to `batch` lines that have arrived go through the model together.

    Raises UserError if the results can't be written at all, as on a full disk.
    """
    if question.of_files:
        outputs.check_writable(question.out)
        if (question.out / NAME).exists():
            raise UserError(f"{question.out}: holds the results of a folder's run; choose another --out for a stream")
    arrived: queue.Queue[_Line | _BadLine | BaseException | None] = queue.Queue(max(1, batch))
    stopped = threading.Event()

    def read_ahead() -> None:
        last: BaseException | None = None
        try:
            number = 0
            while not stopped.is_set() and (text := lines.readline(LONGEST_LINE + 1)):
                number += 1
                try:
                    arrived.put(_read(segmenter, question, lines, number, text))
                except _BadLine as bad:
                    arrived.put(bad)
        except BaseException as error:  # told by the thread that waits
            last = error
        if not stopped.is_set():
            arrived.put(last)

    threading.Thread(target=read_ahead, name="lines", daemon=True).start()
    try:
        ended = False
        while not ended:
            group: list[_Line | _BadLine] = []
            item = arrived.get()
            while isinstance(item, _Line | _BadLine):
                group.append(item)
                if len(group) == batch or arrived.empty():
                    break
                item = arrived.get()
            else:
                ended = True
            yield from _answer(segmenter, question, group)
            if isinstance(item, BaseException) and not isinstance(item, _BadLine):
                raise item
    finally:
        stopped.set()
        with suppress(queue.Empty):  # so that the thread does not wait for room
            while True:
                arrived.get_nowait()


def _read(segmenter: "Segmenter", question: LineQuestion, lines: BinaryIO, number: int, text: bytes) -> _Line:
    """Parse a line, and decode its image. Raises _BadLine."""
    about: dict[str, Any] = {"line": number, "id": None}
    try:
        if len(text) > LONGEST_LINE:
            while text and not text.endswith(b"\n"):
                text = lines.readline(LONGEST_LINE)
            raise UserError(f"the line is longer than {LONGEST_LINE:,} bytes")
        asked = _parsed(text)
        about["id"] = _id(asked.get("id"), needed=bool(question.of_files))
        if unknown := sorted(asked.keys() - set(_KEYS)):
            raise UserError(f"unknown key {short(unknown[0])}: a line has {', '.join(_KEYS)}")
        image = _image(asked.get("image"))
        if isinstance(image, str):
            about["image"] = image
        own = asked.get("words")
        vocabulary = question.vocabulary if own is None else question.parse(own)
        if vocabulary is None:
            raise UserError("neither the line nor the command has words")
        return _Line(about, segmenter.read(image), vocabulary)
    except (UserError, OSError) as error:
        raise _BadLine(about, str(error) if isinstance(error, UserError) else reason(error)) from None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        said = short(text.decode(errors="replace").strip())
        raise UserError(f"not JSON: {said}" if text.strip() else "the line is blank") from None
    if not isinstance(asked, dict):
        raise UserError(f'a line is an object, {{"image": "street.jpg"}}, not {short(asked)}')
    return asked


def _id(given: Any, *, needed: bool) -> str | int | None:
    """Return a line's id if it is one, of text that may name files where that is `needed`."""
    if given is None and not needed:
        return None
    if given is None:
        raise UserError('files are named by the line\'s "id", and it has none')
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise UserError(f'"id" is text or a whole number, not {short(given)}')
    if isinstance(given, str) and not given.isprintable():
        raise UserError(f'"id" {short(given)} has a line break or control character, or is not valid text')
    if needed and isinstance(given, str) and (Path(given).name != given or given[:1] in ("", ".")):
        raise UserError(f'"id" {short(given)} cannot begin a file\'s name')
    return given


def _image(given: Any) -> str | bytes:
    """Return a line's image as `Segmenter.read` takes it: a path, or the bytes of a file."""
    if not isinstance(given, str) or not given:
        raise UserError(f'"image" is a path, or "data:image/jpeg;base64,..." with the file itself, not {short(given)}')
    if match := _DATA.match(given):
        try:
            return base64.b64decode(given[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f'"image" is not valid base64: {short(given)}') from None
    check_regular(Path(given))
    return given


def _answer(
    segmenter: "Segmenter", question: LineQuestion, group: Sequence[_Line | _BadLine]
) -> Generator[dict[str, Any]]:
    images = [item.image for item in group if isinstance(item, _Line)]
    encodings = iter(segmenter.encode_read(images, batch_size=len(images)) if images else [])
    for item in group:
        if isinstance(item, _BadLine):
            about, said = item.args
            yield about | {"error": said}
        else:
            yield item.about | _labelled(segmenter, question, item, next(encodings))


def _labelled(segmenter: "Segmenter", question: LineQuestion, line: _Line, encoding: "Encoding") -> dict[str, Any]:
    try:
        segmentation = segmenter.segment(
            encoding, line.vocabulary, segments=question.rules, threshold=question.threshold
        )
        found: dict[str, Any] = {
            "areas": segmentation.areas,
            "unlabelled": float((segmentation.labels < 0).mean()),
            "confidence": segmentation.about_confidence(),
            "files": [],
        }
        if question.of_files:
            paths = segmentation.save(question.out, str(line.about["id"]), question.of_files)
            found["files"] = [str(path) for path in paths.values()]
        if RLE in question.formats:
            found["masks"] = _masks(segmentation)
        return found
    except UserError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in OF_THE_DISK:
            raise
        return {"error": str(error)}


def _masks(segmentation: "Segmentation") -> list[dict[str, Any]]:
    """Return the words that occur, with what `outputs.record` says of each."""
    record = outputs.record(
        segmentation.labels,
        segmentation.names,
        segmentation.areas,
        segmentation.confidence,
        {},
        segmentation.encoding.model,
        {},
    )
    return [word for word in record["words"] if word["pixels"]]
