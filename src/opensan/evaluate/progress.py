"""Keep an evaluation's progress on disk, so that after an interruption each image is counted exactly once.

Every process keeps a file of its own with all it has counted since the evaluation began, written as a whole and
renamed. The evaluation's counts are the sum of all such files, whoever wrote them: processes may be killed, and others,
more or fewer, may go on.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensan.errors import UserError
from opensan.evaluate.metrics import Counts
from opensan.files import atomic_path, write_text

_KEY = "key.json"


@dataclass
class Progress:
    """The counts of one process."""

    counts: Counts
    photographs: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Index of an image -> its own mIoU (classes in the ground truth) and pixel accuracy."""
    broken: dict[int, str] = field(default_factory=dict)
    """Index -> the reason why it could not be measured; a later run tries again."""
    parts: list[str] = field(default_factory=list)
    """Names of the files of saved predictions, in order."""

    def save(self, path: Path) -> None:
        """Write all of it, all or nothing."""
        about = {"broken": list(self.broken.items()), "parts": self.parts}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                confusion=self.counts.confusion,
                bands=self.counts.bands,
                indices=np.array(list(self.photographs), dtype=np.int64),
                figures=np.array(list(self.photographs.values()), dtype=np.float64).reshape(-1, 2),
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            )

    @classmethod
    def load(cls, path: Path, num_classes: int) -> "Progress":
        """Read a file that `save` wrote. Raises UserError, one line, on any other."""
        counts = Counts(num_classes)
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                confusion, bands = file["confusion"], file["bands"]
                photographs = dict(zip(file["indices"].tolist(), map(tuple, file["figures"].tolist()), strict=True))
            if confusion.shape != counts.confusion.shape or bands.shape != counts.bands.shape:
                raise UserError(f"counts of {len(confusion)} classes, not of {num_classes}")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not an evaluation's progress ({error}); remove it to start anew") from None
        counts.confusion += confusion
        counts.bands += bands
        return cls(counts, photographs, {index: reason for index, reason in about["broken"]}, list(about["parts"]))


def open_progress(folder: Path, key: Mapping[str, object]) -> bool:
    """Prepare `folder` for the evaluation that `key` describes; the progress of another evaluation is removed.

    Returns False if there was another evaluation.
    """
    text = json.dumps(key, indent=1, sort_keys=True, default=str)
    known = (folder / _KEY).read_text(encoding="utf-8") if (folder / _KEY).exists() else None
    if known not in (None, text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _KEY, text)
    return known in (None, text)


def total(parts: Iterable[Progress], num_classes: int) -> Progress:
    """Return all processes' progress together."""
    whole = Progress(Counts(num_classes))
    for part in parts:
        whole.counts.confusion += part.counts.confusion
        whole.counts.bands += part.counts.bands
        whole.photographs |= part.photographs
        whole.broken |= part.broken
        whole.parts += part.parts
    for index in whole.photographs:
        whole.broken.pop(index, None)
    return whole


def read_all(folder: Path, num_classes: int) -> dict[str, Progress]:
    """Read file name -> progress, for every process that ever worked on this evaluation."""
    return {path.name: Progress.load(path, num_classes) for path in sorted(folder.glob("rank-*.npz"))}
