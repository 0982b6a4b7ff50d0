"""Log a run: a CSV row every few steps, and lines about its progress."""

import csv
import io
import math
import re
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from PIL.Image import Image

from opensan.files import naming, write_text


class RunLogger(Protocol):
    """Receiver of a run's figures and pictures besides its CSV files. Called in the main process only."""

    def start(self, step: int) -> None:
        """Begin or resume the run after `step` steps; later steps that were logged before will be logged again."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures after `step` steps, by name; those of validation are called `validation/NAME`."""

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        """Log pictures of a validation, by name."""

    def close(self) -> None:
        """End the run, finished or not."""


class CsvLog:
    """A CSV file whose first column is the number of steps done. After a resume no row is lost or repeated."""

    def __init__(self, path: Path, done: int) -> None:
        """Continue the file after `done` steps: rows of later steps, and a half-written last row, are dropped."""
        self.path = path
        self.columns: list[str] | None = None
        if path.exists():
            self._drop_after(done)

    def _drop_after(self, done: int) -> None:
        text = self.path.read_text(encoding="utf-8")
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        if not rows:
            self.path.unlink()
            return
        self.columns = rows[0]
        kept = [rows[0], *(row for row in rows[1:] if int(row[0]) <= done)]
        write_text(self.path, "".join(_line(row) for row in kept))

    def add(self, step: int, figures: Mapping[str, float | str]) -> None:
        """Append a row. All rows have the first one's columns."""
        row = {"step": step, **figures}
        lines = ""
        if self.columns is None:
            self.columns = list(row)
            lines = _line(self.columns)
        assert list(row) == self.columns, (list(row), self.columns)
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(lines + _line([_shown(value) for value in row.values()]))


def _line(cells: list) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _shown(value: float | str) -> str:
    # repr keeps every bit of a float, so that two runs can be compared exactly.
    return repr(value) if isinstance(value, float) else str(value)


class TrainingProgress:
    """Reports how a training goes, by lines on stderr. `opensan train` has one that draws a bar on a terminal."""

    def begin(self, steps: int, done: int) -> "TrainingProgress":
        """Begin to report a run of `steps` steps, of which `done` are done; use it in a `with` block."""
        self._steps, self._first, self._started = steps, done, time.monotonic()
        return self

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *error: object) -> None:
        """End the report, finished or not."""

    def advance(self, step: int) -> None:
        """Report that `step` steps are done."""

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Report the newest figures that fit on a line; the log has all."""
        eta = ""
        if step > self._first + 1:  # the first step takes longer than others
            seconds = (time.monotonic() - self._started) / (step - self._first) * (self._steps - step)
            eta = f", ETA {timedelta(seconds=round(seconds))}"
        self.say(f"{step}/{self._steps}{eta}: {summary(figures)}")

    def say(self, message: str) -> None:
        """Report an event in a line."""
        print(message, file=sys.stderr, flush=True)


class NoProgress(TrainingProgress):
    """Reports nothing: for comparisons, and for the processes of a training besides the main one."""

    def say(self, message: str) -> None:
        """Keep quiet."""


def summary(figures: Mapping[str, float]) -> str:
    """Return a step's figures as one line: the losses of the last block, the learning rate, speed and memory."""
    last_block = {name: value for name, value in figures.items() if re.fullmatch(r"loss_[a-z]+", name)}
    parts = [" ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in last_block.items())]
    if "loss" in figures:
        parts.insert(0, f"loss {figures['loss']:.4g}")
    for name, form in (
        ("learning_rate", "lr {:.2e}"),
        ("samples_per_second", "{:.3g} samples/s"),
        ("waiting_for_data", "waiting {:.0%}"),
        ("peak_memory_mib", "{:,.0f} MiB"),
    ):
        if name in figures and math.isfinite(figures[name]):
            parts.append(form.format(figures[name]))
    return ", ".join(part for part in parts if part)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the device if it counts it, else of this process; nan if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not a Unix
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
