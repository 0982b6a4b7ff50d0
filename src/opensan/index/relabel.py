"""Label the images of an index with other words, from what is stored: the model's image half does not run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.errors import UserError
from opensan.files import absolute
from opensan.images import ImageError, PreparedImage, open_image
from opensan.index.rows import ABOUT, NOT_THE_SAME, SIZES, ImageRow, encoding_of
from opensan.index.store import IMAGES, PROPOSALS, Store
from opensan.segmenters.proposals import ProposalSegmenter
from opensan.segmenters.results import Encoding, InputImage, Segmentation

if TYPE_CHECKING:
    from opensan.index.head import Head

TOGETHER = 64
"""Images whose rows are read at a time."""

STORED = "from an index"
"""Speed, in records of results, of labels that are made of masks and vectors with fewer digits."""


def stored_encodings(head: "Head", store: Store, ids: Sequence[int]) -> dict[int, Encoding]:
    """Return the encodings of images that have proposals of their own, by id, as far as they are stored."""
    about = store.rows(IMAGES, [*ABOUT, *SIZES, "encoding"], "id", ids)
    proposals: dict[int, list[dict[str, Any]]] = {row["id"]: [] for row in about}
    if not head.exact:
        for row in store.rows(PROPOSALS, ["image", "query", "vector", "mask"], "image", ids):
            proposals[row["image"]].append(row)
    model = head.model.encodings
    return {row["id"]: encoding_of(row, proposals[row["id"]], model, head.width) for row in about}


def owner(row: ImageRow) -> int:
    """Return the id of the image whose proposals a row's are."""
    return row.id if row.same_as == NOT_THE_SAME else row.same_as


@dataclass(frozen=True)
class _Stored(InputImage):
    """An image that comes with its encoding."""

    encoding: Encoding | None = None


class StoredSegmenter:
    """A segmenter that takes encodings from an index where others compute them, so that a `FolderRun` can use it.

    All else is the model's.
    """

    def __init__(
        self,
        segmenter: ProposalSegmenter,
        rows: dict[str, ImageRow],
        fetch: Callable[[int], Encoding],
        *,
        exact: bool,
        pixels: bool,
    ) -> None:
        """`rows` are the index's images by path, `fetch` returns an encoding by id.

        `exact`: whether labels are those of the model itself. `pixels`: whether results need the images, too.
        """
        self._segmenter, self._rows, self._fetch, self._pixels = segmenter, rows, fetch, pixels
        self.speed = segmenter.speed if exact else STORED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segmenter, name)

    def read(self, path: Path) -> InputImage:
        """Return an image with its encoding. Raises ImageError if its file has changed since it was added."""
        row = self._rows[str(absolute(path))]
        if not row.stamp.still_holds(path):
            raise ImageError(f"{path}: has changed since it was added to the index; add it again")
        encoding = self._fetch(owner(row))
        image = open_image(path, max_pixels=self._segmenter.max_pixels) if self._pixels else None
        prepared = PreparedImage(np.zeros((0, 0, 3), np.float32), encoding.sizes)
        return _Stored(image, prepared, path.stem, replace(encoding, image=image, stem=path.stem))

    def encode_read(self, images: Sequence[InputImage], *, batch_size: int = 1) -> list[Encoding]:
        """Return the encodings that `read` found."""
        assert batch_size
        return [image.encoding for image in images if isinstance(image, _Stored) and image.encoding is not None]

    def segment(self, images: Any, words: Any, **options: Any) -> Segmentation:
        """Label an encoding; see `Segmenter.segment`."""
        return replace(self._segmenter.segment(images, words, **options), segmenter=self)


def each_encoding(
    read: Callable[[Sequence[int]], dict[int, Encoding]], rows: Sequence[ImageRow]
) -> Iterator[tuple[ImageRow, Encoding]]:
    """Yield images with their encodings, some at a time in memory; `read` returns those of some ids.

    Images that somebody removes meanwhile are left out.
    """
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        encodings = read(sorted({owner(row) for row in some}))
        for row in some:
            if (encoding := encodings.get(owner(row))) is not None:
                yield row, replace(encoding, stem=Path(row.path).stem)


def only(encodings: dict[int, Encoding], number: int) -> Encoding:
    """Return the encoding of one image. Raises UserError if the index has it no more."""
    if number not in encodings:
        raise UserError("an image was removed from the index meanwhile; run the command again")
    return encodings[number]
