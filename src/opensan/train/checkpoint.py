"""Store a run's checkpoints: complete or absent, checked when read, with an older one as a fallback.

A checkpoint's name holds the start of its content's SHA-256, so damage is noticed before the content is parsed:
`step-00000500-0123456789abcdef.pt`, and `best-...` for the best one.
"""

import hashlib
import io
import math
import re
from pathlib import Path
from typing import Any

import torch

from opensan.errors import UserError
from opensan.files import atomic_path

_NAME = re.compile(r"(step|best)-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many of the newest are kept."""
        self.folder = folder
        self.keep = keep
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, state: dict[str, Any], step: int, *, kind: str = "step") -> Path:
        """Write `state` (tensors and plain data), then remove checkpoints beyond those to keep."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        path = self.folder / f"{kind}-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        stay = [path] if kind == "best" else self._newest_first(kind)[: self.keep]
        for old in self._newest_first(kind):
            if old not in stay:
                old.unlink()
        return path

    def load_newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest undamaged state (None if there is none), and a message about each damaged one."""
        messages: list[str] = []
        for path in self._newest_first("step"):
            try:
                return _read(path), messages
            except (UserError, OSError) as error:
                messages.append(f"{error}; falling back to the checkpoint before")
                path.replace(path.with_suffix(".damaged"))
        return None, messages

    def load_best(self) -> dict[str, Any] | None:
        """Return the state with the best validation score, None without validation. Raises UserError if damaged.

        There are two files where a run was killed before it removed the one before.
        """
        states = [_read(path) for path in self._newest_first("best")]
        return max(states, key=_score, default=None)

    def _newest_first(self, kind: str) -> list[Path]:
        matches = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        own = sorted(((int(match[2]), match[0]) for match in matches if match[1] == kind), reverse=True)
        return [self.folder / name for _, name in own]


def _score(state: dict[str, Any]) -> float:
    """Return the validation score that a best checkpoint was saved with; without one, the lowest."""
    best = state.get("best")
    return -math.inf if best is None or math.isnan(best) else best


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises UserError if its content is damaged."""
    content = path.read_bytes()
    match = _NAME.fullmatch(path.name)
    if match is None or hashlib.sha256(content).hexdigest()[:16] != match[3]:
        raise UserError(f"{path}: damaged (its checksum does not fit its name)")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
