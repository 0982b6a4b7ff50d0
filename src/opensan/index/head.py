"""The head of an index: index.json, which names the versions of the tables that belong together.

It is replaced by a rename. Whatever a stopped writer has added to the tables since is no part of the index.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opensan.errors import UserError, reason, short
from opensan.files import json_text, write_text
from opensan.index.contrast import Contrast
from opensan.segmenters.proposals import ProposalSegmenter
from opensan.structures import Identity

NAME = "index.json"
FORMAT = 2
"""Version of the tables and of this file, to be increased when an older package can't read them.

1: masks are run lengths, and proposals have no contrast. Such an index is read, and becomes one of format 2 when it is
written to; its masks stay as they are.
"""


@dataclass(frozen=True)
class Maker:
    """Properties of a model that must be equal for encodings of one index."""

    model: Identity
    speed: str
    dtype: str
    width: int
    """Numbers of a proposal's vector."""
    contrast: str = ""
    """Identity of its default contrast words; see `Contrast.identity`."""

    @classmethod
    def of(cls, segmenter: ProposalSegmenter) -> "Maker":
        """Return what a segmenter is."""
        dtype = str(segmenter.dtype).removeprefix("torch.")
        contrast = Contrast(segmenter).identity
        return cls(segmenter.identity, str(segmenter.speed), dtype, segmenter.text.dimension, contrast)


@dataclass(frozen=True)
class Head:
    """The state of an index."""

    model: Identity
    source: str
    """Argument of `opensan.load` that made the model: a name, or an absolute path."""
    speed: str
    dtype: str
    exact: bool
    """Whether the encodings are kept whole, so that labels are those of `segment` to the pixel."""
    width: int
    """Numbers of a proposal's vector."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Version of each table."""
    next_id: int = 1
    """The next image's number. Numbers are never used again."""
    images: int = 0
    proposals: int = 0
    contrast: str = ""
    """Identity of the words of the proposals' contrasts; "" if they have none."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it to the folder, all or nothing."""
        write_text(folder / NAME, json_text(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Head":
        """Read it. Raises UserError, one line, where there is no index, a damaged one, or one of a newer format."""
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no index (there is no {NAME}); `opensan index add` makes one") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: can't be read ({reason(error)}); {REMEDY}") from None
        try:
            return cls._parse(path, data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: damaged ({reason(error)}); {REMEDY}") from None

    @classmethod
    def _parse(cls, path: Path, data: Any) -> "Head":
        if (form := data["format"]) not in range(1, FORMAT + 1):
            newer = isinstance(form, int) and form > FORMAT
            raise UserError(
                f"{path}: format {short(form)}, and this version of opensan reads 1 to {FORMAT}"
                + ("; update opensan" if newer else f"; {REMEDY}")
            )
        versions = {str(name): int(version) for name, version in data.pop("versions").items()}
        head = cls(Identity(**data.pop("model")), versions=versions, **data)
        for name in ("source", "speed", "dtype", "contrast"):
            if not isinstance(getattr(head, name), str):
                raise ValueError(f"{name} is {short(getattr(head, name))}, not a text")
        for name in ("width", "next_id", "images", "proposals"):
            if type(number := getattr(head, name)) is not int or number < 0:
                raise ValueError(f"{name} is {short(number)}, not a whole number from 0")
        if not isinstance(head.exact, bool) or set(versions) != {"images", "proposals"}:
            raise ValueError("exact is neither true nor false, or versions are not those of images and proposals")
        return head


REMEDY = "copy the index from a backup, or add the images to a new one"
"""Remedy in messages about a damaged index."""
