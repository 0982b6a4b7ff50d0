"""Make FiftyOne's labels of a segmentation; the library is imported when a function needs it.

Letters: H0 W0 the image.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opensan.assemble.segments import Segments
from opensan.errors import UserError

if TYPE_CHECKING:
    from fiftyone import Detections, Segmentation

MOST_WORDS = 65_535
"""FiftyOne's masks have at most 16 bits, and 0 is no label."""

_HAIR = 1e-9
"""Share of the image by which a box is moved: FiftyOne cuts pixels' numbers off, and 122.99999 would be 122."""


def mask_targets(names: Sequence[str]) -> dict[int, str]:
    """Return FiftyOne's `mask_targets`: the word of each value of a mask, from 1; 0 is unlabelled."""
    return dict(enumerate(names, 1))


def fiftyone_segmentation(labels: np.ndarray, count: int) -> "Segmentation":
    """Return labels [H0, W0] (0..count-1, or -1) as `fiftyone.Segmentation`, its mask the label + 1.

    Raises UserError, one line, if FiftyOne is not installed, or has no numbers for so many words.
    """
    if count > MOST_WORDS:
        raise UserError(f"FiftyOne's masks have {MOST_WORDS:,} values, and there are {count:,} words")
    _check_installed()
    from fiftyone import Segmentation

    return Segmentation(mask=(labels + 1).astype(np.uint8 if count <= 255 else np.uint16))


def fiftyone_detections(segments: Segments) -> "Detections":
    """Return segments as `fiftyone.Detections`: word, box as shares of the image, mask within the box, and score.

    Each has the attributes `kind` ("thing" or "stuff") and `segment`, its number from 1. Raises UserError, one line, if
    FiftyOne is not installed.
    """
    _check_installed()
    from fiftyone import Detection, Detections

    height, width = segments.ids.shape
    detections = []
    for segment in segments:
        left, top, across, down = segment.box
        detections.append(
            Detection(
                label=segment.word,
                bounding_box=[left / width + _HAIR, top / height + _HAIR, across / width, down / height],
                mask=segments.ids[top : top + down, left : left + across] == segment.id,
                confidence=float(segment.score),
                kind=segment.kind,
                segment=segment.id,
            )
        )
    return Detections(detections=detections)


def _check_installed() -> None:
    try:
        import fiftyone  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "fiftyone":
            raise
        raise UserError("to_fiftyone needs FiftyOne: pip install fiftyone") from None
