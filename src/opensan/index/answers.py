"""Answers of a search: images with their regions.

Letters: h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensan.assemble.interpolation import interpolation_matrices
from opensan.outputs.coco import run_lengths
from opensan.structures import ImageSizes

DIGITS = 6
"""Digits of numbers in [0, 1] in plain data."""


@dataclass(frozen=True, eq=False)
class Region:
    """A region of an image that matches the searched word: one of its mask proposals."""

    probability: float
    """Probability of the word, in [0, 1]; not calibrated."""
    area: float
    """Share of the image's pixels, in [0, 1]."""
    box: tuple[int, int, int, int]
    """Left, top, width, height in pixels, to the model's grid."""
    query: int
    """Number of the proposal in the encoding."""
    cells: NDArray[np.bool_]
    """[h, w]: its mask on the model's grid, padding included."""
    sizes: ImageSizes

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Its mask, [H0, W0] bool: the cells, resized as the model resizes its masks."""
        down, across = interpolation_matrices((self.cells.shape[0], self.cells.shape[1]), self.sizes)
        return down @ self.cells.astype(np.float32) @ across.T >= 0.5

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the mask as COCO run lengths of the image's size."""
        height, width = self.sizes.image
        labels = self.mask.astype(np.int8) - 1
        rle = run_lengths(labels, 1).get(0, {"size": [height, width], "counts": ""})
        return {
            "probability": round(self.probability, DIGITS),
            "area": round(self.area, DIGITS),
            "box": list(self.box),
            "proposal": self.query,
            "rle": rle,
        }


@dataclass(frozen=True, eq=False)
class Match:
    """An image that a search returns."""

    path: str
    """Absolute path of the image when it was added."""
    score: float
    """Score in [0, 1]; not calibrated."""
    size: tuple[int, int]
    """Height and width in pixels."""
    regions: Sequence[Region]
    """The regions that match, most probable first, without repetitions; at least one, the best."""
    same: Sequence[str] = field(default=())
    """Further files with the same content."""

    def __repr__(self) -> str:
        return f"<Match {self.path}: score {self.score:.2f}, {len(self.regions)} regions>"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        height, width = self.size
        return {
            "image": self.path,
            "score": round(self.score, DIGITS),
            "width": width,
            "height": height,
            "same": list(self.same),
            "regions": [region.to_dict() for region in self.regions],
        }


@dataclass(frozen=True, eq=False)
class Answer(Sequence[Match]):
    """Result of a search: its matches, best first."""

    matches: Sequence[Match]
    question: Mapping[str, Any]
    """The question, as plain data."""
    images: int
    """Images in the index."""
    approximate: bool
    """Whether a part of the proposals alone was looked at."""

    def __len__(self) -> int:
        return len(self.matches)

    def __getitem__(self, index: Any) -> Any:
        return self.matches[index]

    def __repr__(self) -> str:
        return f"<Answer to {self.question['search']!r}: {len(self)} of {self.images} images>"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "format": 1,
            **self.question,
            "images": self.images,
            "approximate": self.approximate,
            "matches": [match.to_dict() for match in self.matches],
        }

    def to_coco(self) -> dict[str, Any]:
        """Return the regions as a COCO data set of one category, the searched word; `score` is the probability."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, match in enumerate(self.matches, 1):
            height, width = match.size
            images.append({"id": number, "file_name": match.path, "width": width, "height": height})
            for region in match.regions:
                mask = region.mask
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 1,
                        "segmentation": region.to_dict()["rle"],
                        "area": int(mask.sum()),
                        "bbox": list(region.box),
                        "iscrowd": 0,
                        "score": round(region.probability, DIGITS),
                    }
                )
        categories = [{"id": 1, "name": self.question["search"]}]
        return {"images": images, "annotations": annotations, "categories": categories}
