"""`opensan.load`: any model, with torch or, if it was exported, without."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from opensan.runtime.folder import exported_folder
from opensan.segmentation import AnySegmenter

if TYPE_CHECKING:
    import torch


class LoadOptions(TypedDict, total=False):
    """The options of `load`, for editors and type checkers; `opensan.segmenter.load` says what they mean."""

    device: "str | torch.device"
    speed: Literal["exact", "fast"]
    dtype: Literal["float32", "bfloat16"] | None
    random_weights: int | None
    max_pixels: int
    text_cache: bool
    threads: int


def load(source: str | os.PathLike[str] = "san-vit-b16", **options: Unpack[LoadOptions]) -> AnySegmenter:
    """Load a model, ready to segment.

    Args:
        source: what `opensan.segmenter.load` takes, or what `opensan export` wrote: its folder, or a graph in it
            ("exported/image.onnx"). That needs no torch.
        options: as for `opensan.segmenter.load`. Of an exported model, `max_pixels` and `text_cache`, and `threads`
            (0: the runtime decides); the other ones were decided when it was exported.

    Raises:
        ValueError: unknown model or option, a damaged file, or a missing library; one line.
        ConnectionError: the hub did not answer; says what was tried and what works offline.
    """
    asked: dict[str, Any] = {**options}
    folder = exported_folder(source)
    if folder is None:
        if find_spec("torch") is None:
            raise ValueError(
                f"model {os.fspath(source)!r} needs torch (pip install torch); without torch, opensan runs what "
                "`opensan export` wrote"
            )
        with _uncollected():
            from opensan.segmenter import load as load_with_torch

        return load_with_torch(source, **asked)
    from opensan.runtime.segmenter import ExportedSegmenter

    decided = {"device": ("cpu",), "speed": ("exact",), "dtype": (None,), "random_weights": (None,)}
    for name, allowed in decided.items():
        if asked.pop(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} can't be chosen for an exported model ({folder}): it runs on the CPU as exported")
    return ExportedSegmenter(folder, **asked)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: in what an import makes there is none, and it takes an eighth of torch's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
