"""Read and write predictions: the usual `sem_seg_predictions.json`, and folders of index PNGs.

The JSON is a list of {"file_name", "category_id", "segmentation": {"size": [H, W], "counts": "..."}}, one entry for
each class of an image's prediction, its mask in COCO's run-length encoding. It is written and read
entry by entry, so neither needs memory for the whole.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from opensan.errors import UserError
from opensan.files import atomic_path
from opensan.images import image_size
from opensan.outputs import read_label_map
from opensan.outputs.coco import decode_mask, run_lengths
from opensan.vocabulary import UNLABELLED

FILE_NAME = "sem_seg_predictions.json"

LONGEST_ENTRY = 64 * 2**20
"""Bytes; a longer entry can't be the mask of an image."""

_READ = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def entries(file_name: str, labels: np.ndarray, num_classes: int) -> list[str]:
    """Return the JSON entries of one image's prediction [H, W] (0..K-1, or -1), by ascending `category_id`."""
    masks = run_lengths(labels, num_classes)
    return [
        json.dumps({"file_name": file_name, "category_id": index, "segmentation": mask})
        for index, mask in sorted(masks.items())
    ]


def write_list(entries: Iterable[str], target: Path) -> None:
    """Write JSON entries as one list, an entry a line; one is in memory at a time."""
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as out:
        start = "[\n"
        for entry in entries:
            out.write(start + entry)
            start = ",\n"
        out.write("[]\n" if start == "[\n" else "\n]\n")


class SavedPredictions:
    """Another run's predictions, by image. Several threads may read."""

    def __init__(self, path: Path, num_classes: int, *, class_of_id: Mapping[int, int] | None = None) -> None:
        """Open a file or folder of predictions.

        Args:
            path: a `sem_seg_predictions.json`, or a folder of index PNGs, NAME.png or NAME.labels.png.
            num_classes: K.
            class_of_id: `category_id` -> class, if the ids are not the classes' indices in the vocabulary.

        Raises:
            ValueError: one line: no such file, or not a list of such entries.
        """
        self.path = path
        self.num_classes = num_classes
        self.class_of_id = class_of_id
        if path.is_dir():
            self._spans = None
        elif path.is_file():
            self._spans = _index(path)
        else:
            raise UserError(f"{path}: no such file or folder of predictions")

    def fingerprint(self) -> str:
        """Return a text that changes when the file does."""
        state = self.path.stat()
        return f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns}"

    def labels(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Return the prediction [H, W] int32 for an image, -1 where it has none.

        Raises ValueError, one line, if there is none for it, or it does not fit `size`, the image's (H, W).
        """
        labels = self._from_picture(name, size) if self._spans is None else self._from_entries(name, size)
        if labels.max() >= self.num_classes:
            raise UserError(
                f"{self.path}: the prediction for {name} holds {labels.max()}, there are {self.num_classes} classes"
            )
        return labels

    def _from_picture(self, name: str, size: tuple[int, int]) -> np.ndarray:
        candidates = [self.path / f"{name}.png", self.path / f"{name}.labels.png"]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(f"{self.path}: holds neither {candidates[0].name} nor {candidates[1].name}")
        stored = image_size(path)  # checked before decoding, which could need memory without bound
        if stored != size:
            raise UserError(f"{path}: is {stored[1]}x{stored[0]}, the image {size[1]}x{size[0]} (width x height)")
        return read_label_map(path)

    def _from_entries(self, name: str, size: tuple[int, int]) -> np.ndarray:
        if self._spans is None or name not in self._spans:
            raise UserError(f"{self.path}: no prediction for {name}")
        labels = np.full(size, UNLABELLED, dtype=np.int32)
        with self.path.open("rb") as file:
            for start, end in self._spans[name]:
                file.seek(start)
                entry = json.loads(file.read(end - start))
                try:
                    labels[decode_mask(_segmentation(entry), *size)] = self._class(entry)
                except UserError as error:
                    raise UserError(f"{self.path}: prediction for {name}: {error}") from None
        return labels

    def _class(self, entry: Mapping[str, Any]) -> int:
        number = entry.get("category_id")
        known = range(self.num_classes) if self.class_of_id is None else self.class_of_id
        if type(number) is not int or number not in known:
            raise UserError(f"category_id {str(number)[:40]} is none of the {self.num_classes} classes'")
        return number if self.class_of_id is None else self.class_of_id[number]


def _segmentation(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    segmentation = entry.get("segmentation")
    if not isinstance(segmentation, dict):
        raise UserError('no "segmentation" with size and counts')
    return segmentation


def _index(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Return image name -> positions of its entries in the file (bytes from, to)."""
    spans = defaultdict(list)
    for start, end, entry in _entries(path):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UserError(f'{path}: the entry at byte {start} has no "file_name"; is this a sem_seg JSON?')
        spans[PurePosixPath(name.replace("\\", "/")).stem].append((start, end))
    return dict(spans)


def _entries(path: Path) -> Iterator[tuple[int, int, object]]:
    """Yield (first byte, last byte + 1, entry) of each entry of a JSON list; one is in memory at a time.

    The text is read as Latin-1, in which a byte is a character and JSON's own signs have the same bytes as in UTF-8.
    """
    decoder = json.JSONDecoder()
    with path.open("r", encoding="latin-1", newline="") as file:
        text, offset, at = file.read(_READ), 0, 0
        at = len(text) - len(text.lstrip())
        if text[at : at + 1] != "[":
            raise UserError(f"{path}: not a JSON list of predictions")
        at += 1
        while True:
            between = _BETWEEN.match(text, at)
            assert between is not None  # it matches nothing too
            at = between.end()
            if text[at : at + 1] == "]":
                return
            try:
                entry, end = decoder.raw_decode(text, at)
                if not text.isascii():
                    entry = json.loads(text[at:end].encode("latin-1"))
            except (ValueError, RecursionError) as error:
                # Perhaps the text only ends too early: read twice as much.
                more = file.read(max(_READ, len(text) - at)) if len(text) - at < LONGEST_ENTRY else ""
                if not more:
                    raise UserError(f"{path}: not valid JSON after byte {offset + at} ({error})") from None
                text, offset, at = text[at:] + more, offset + at, 0
                continue
            yield offset + at, offset + end, entry
            at = end
