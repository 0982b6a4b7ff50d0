"""Read the official .pth files, which are pickles, without executing code in them."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensan.checkpoints.native import build_empty, fill
from opensan.checkpoints.official import from_official, official_name, official_shape
from opensan.checkpoints.presets import PRESETS
from opensan.config import ModelConfig
from opensan.errors import UserError, reason
from opensan.files import check_regular
from opensan.model import SAN

_REFUSED = re.compile(r"GLOBAL ([\w.]+)|reduce for unrecognized function (.+)|Can only (?:create|build) .+")
"""Messages of torch's weights-only unpickler about objects that it refused to import or call."""


class _Left:
    """Replaces a numpy value beside the weights (a metric, a random state), which is not needed.

    A checkpoint written in training may hold some. numpy's own constructors are not allowed instead:
    they trust the file, down to the memory layout it claims.
    """

    def __new__(cls, *_: object) -> "_Left":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Left, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
    )
]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an official checkpoint, by official name.

    Raises:
        ValueError: the file is no torch file, asks to run code, or holds no tensors under `model`.
    """
    check_regular(path)
    if path.is_file() and _is_zip(path):
        _check_size(path)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # a damaged pickle can fail in any way: struct.error, AssertionError, IndexError, ...
        if refused := _REFUSED.search(str(error)):
            what = refused[1] or refused[2] or "an object"
            raise UserError(f"{path}: refused: besides weights it asks for {what}; nothing of it was run") from None
        # torch's own message may advise to load the file unsafely, so it is left out.
        detail = "" if "weights_only" in reason(error) else f" ({reason(error)})"
        raise UserError(f"{path}: not a readable PyTorch checkpoint{detail}") from None
    state = data.get("model", data) if isinstance(data, dict) else None
    weights = {str(name): value for name, value in state.items() if _is_plain(value)} if isinstance(state, dict) else {}
    if not weights:
        raise UserError(f"{path}: holds no model weights (expected tensors by name, under 'model' or at the top)")
    return weights


def _is_plain(value: object) -> bool:
    """Return whether `value` is a dense tensor in memory; a file may also hold sparse and "meta" tensors."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _check_size(path: Path) -> None:
    """Raise UserError if a zip file would unpack to more than it is: torch stores tensors as they are."""
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(info.file_size for info in file.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong with it
    if unpacked > path.stat().st_size:
        raise UserError(f"{path}: refused: compressed, it unpacks to {unpacked:,} bytes; torch compresses nothing")


def _is_zip(path: Path) -> bool:
    """Return whether the file has torch's newer, zip-based format, which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_official(path: Path, config: ModelConfig | None = None) -> SAN:
    """Load an official .pth. Without `config`, the preset with the same tensors and shapes is chosen.

    Raises:
        ValueError: unreadable, or naming missing and surplus keys and wrong shapes.
    """
    state = read_pickle(path)
    config = config or _matching_preset(state)
    shapes = {name: tensor.shape for name, tensor in build_empty(config).state_dict().items()}
    return fill(config, from_official(state, config, shapes, str(path)), str(path))


def _matching_preset(state: dict[str, Tensor]) -> ModelConfig:
    """Return the preset of which most tensors have the same name and shape; the load that follows is strict."""

    def agreement(config: ModelConfig) -> int:
        names = {name: tensor.shape for name, tensor in build_empty(config).state_dict().items()}
        wanted = {official_name(name, config): official_shape(name, shape) for name, shape in names.items()}
        return sum(name in state and tuple(state[name].shape) == shape for name, shape in wanted.items())

    return max((preset.config for preset in PRESETS.values() if preset.official), key=agreement)
