"""Convert a segmentation to the types of other libraries, which are imported when a method needs them.

Letters: N rows, regions of words or segments; H0 W0 the image.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opensan.errors import UserError, install
from opensan.outputs import mean_confidence
from opensan.segmenters.fiftyone_labels import fiftyone_detections, fiftyone_segmentation, mask_targets

if TYPE_CHECKING:
    from fiftyone import Detections as FiftyOneDetections
    from fiftyone import Segmentation as FiftyOneSegmentation
    from supervision import Detections

    from opensan.assemble.segments import Segments


@dataclass(frozen=True)
class Rows:
    """Table of what libraries of detection know of an image: a row for each region of a word, or for each segment."""

    masks: NDArray[np.bool_]
    """[N, H0, W0]"""
    boxes: NDArray[np.float32]
    """[N, 4] left, top, right, bottom in pixels; right and bottom lie behind the last pixel, as in COCO's files."""
    labels: NDArray[np.int64]
    """[N] index into the segmentation's names."""
    names: list[str]
    """[N] words."""
    scores: NDArray[np.float32]
    """[N] in [0, 1]: a region's mean confidence, a segment's score."""
    areas: NDArray[np.int64]
    """[N] pixels."""
    things: NDArray[np.bool_] | None
    """[N] whether a segment is an object of a thing; None for regions."""
    ids: NDArray[np.int64] | None
    """[N] number of each segment, from 1; None for regions."""


class Conversions:
    """Methods of `Segmentation` that return other libraries' types."""

    if TYPE_CHECKING:
        labels: NDArray[np.int32]
        names: list[str]

        @property
        def confidence(self) -> NDArray[np.float32]: ...
        @property
        def segments(self) -> Segments: ...

    def rows(self, segments: bool = False) -> Rows:
        """Return a row for each word that occurs, in the vocabulary's order, or for each of `self.segments`."""
        if segments:
            return _rows_of_segments(self.segments, self.names, self.labels.shape)
        means = mean_confidence(self.labels, self.confidence, len(self.names))
        present = [label for label, mean in enumerate(means) if mean is not None]
        masks = np.zeros((len(present), *self.labels.shape), dtype=bool)
        for mask, label in zip(masks, present, strict=True):
            np.equal(self.labels, label, out=mask)
        return Rows(
            masks,
            np.array([_box(mask) for mask in masks], dtype=np.float32).reshape(-1, 4),
            np.array(present, dtype=np.int64),
            [self.names[label] for label in present],
            np.array([means[label] for label in present], dtype=np.float32),
            masks.sum(axis=(1, 2), dtype=np.int64),
            None,
            None,
        )

    def to_supervision(self, segments: bool = False) -> "Detections":
        """Return `supervision.Detections`, for its annotators, filters, trackers and data sets.

        A detection is a word's region, with its mean confidence; or with `segments=True` one of `self.segments`, with
        its score. `class_id` is the index into `names`, and `data["class_name"]` the word. Segments also have
        `data["segment_id"]`, their number from 1, and `data["is_thing"]`. Boxes end behind the last pixel, as in data
        sets that supervision reads.

        Raises UserError, one line, if supervision is not installed or, with `segments=True`, the model proposes no
        masks.
        """
        try:
            from supervision import Detections
        except ImportError:
            raise UserError(f"to_supervision needs supervision: {install('supervision')}") from None
        rows = self.rows(segments)
        data: dict[str, Any] = {"class_name": np.array(rows.names, dtype=str)}
        if rows.ids is not None:
            data |= {"segment_id": rows.ids, "is_thing": rows.things}
        return Detections(
            xyxy=rows.boxes, mask=rows.masks, confidence=rows.scores, class_id=rows.labels.astype(int), data=data
        )

    def to_tv_tensors(self, segments: bool = False) -> dict[str, Any]:
        """Return torchvision's tv_tensors, which `torchvision.transforms.v2` transforms together with the image.

        The names are those of torchvision's detection models: "masks" (`tv_tensors.Mask`, [N, H0, W0] bool), "boxes"
        (`tv_tensors.BoundingBoxes`, [N, 4] XYXY, ending behind the last pixel), "labels" ([N] int64, index into
        `names`), "scores" ([N] float32), "area" ([N] int64, pixels). A row is a word's region or, with
        `segments=True`, one of `self.segments`. "semantic" is the whole label map (`tv_tensors.Mask`, [H0, W0] int64,
        -1 for unlabelled).

        Raises UserError, one line, if torchvision is not installed or, with `segments=True`, the model proposes no
        masks.
        """
        try:
            import torch
            from torchvision import tv_tensors
        except ImportError:
            raise UserError(f"to_tv_tensors needs torchvision: {install('torchvision')}") from None
        rows = self.rows(segments)
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(rows.boxes), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=self.labels.shape
        )
        return {
            "masks": tv_tensors.Mask(torch.from_numpy(rows.masks)),
            "boxes": boxes,
            "labels": torch.from_numpy(rows.labels),
            "scores": torch.from_numpy(rows.scores),
            "area": torch.from_numpy(rows.areas),
            "semantic": tv_tensors.Mask(torch.from_numpy(self.labels.astype(np.int64))),
        }

    def to_fiftyone(self, segments: bool = False) -> "FiftyOneSegmentation | FiftyOneDetections":
        """Return `fiftyone.Segmentation` for a field of a sample; with `segments=True`, `fiftyone.Detections`.

        The mask's values are the index into `names` + 1, and 0 for unlabelled: `mask_targets` names them for the data
        set. A detection is one of `self.segments`, with its mask, its score as confidence, and `kind`.

        Raises UserError, one line, if FiftyOne is not installed or, with `segments=True`, the model proposes no masks.
        """
        return fiftyone_detections(self.segments) if segments else fiftyone_segmentation(self.labels, len(self.names))

    @property
    def mask_targets(self) -> dict[int, str]:
        """The words by the values of `to_fiftyone`'s mask: what `dataset.default_mask_targets` takes."""
        return mask_targets(self.names)


def _rows_of_segments(segments: "Segments", names: list[str], size: tuple[int, ...]) -> Rows:
    boxes = np.array([segment.box for segment in segments], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Rows(
        np.array([segment.mask for segment in segments], dtype=bool).reshape(-1, *size),
        boxes,
        np.array([names.index(segment.word) for segment in segments], dtype=np.int64),
        [segment.word for segment in segments],
        np.array([segment.score for segment in segments], dtype=np.float32),
        np.array([segment.area for segment in segments], dtype=np.int64),
        np.array([segment.kind == "thing" for segment in segments], dtype=bool),
        np.array([segment.id for segment in segments], dtype=np.int64),
    )


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a mask [H, W] that has a pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
