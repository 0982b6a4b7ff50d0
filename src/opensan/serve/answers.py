"""Make the response bodies of segmentations.

Letters: Q queries, K words, h w stride-16 grid, H W the image.
"""

import base64
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from opensan import outputs
from opensan.assemble.bands import to_array
from opensan.errors import UserError
from opensan.segmenters.base import Segmenter
from opensan.segmenters.explanation import check_pixel, explain_pixel
from opensan.segmenters.proposals import with_proposals
from opensan.segmenters.results import Encoding, Segmentation
from opensan.serve.limits import Problem
from opensan.serve.schemas import Format, PointAnswer, PointProposal, PointWord
from opensan.vocabulary import Vocabulary

MAP_TYPE = "application/vnd.opensan.map"

MEDIA_TYPES = {
    Format.json: "application/json",
    Format.labels: "image/png",
    Format.overlay: "image/png",
    Format.map: MAP_TYPE,
}

_FAST_COMPRESSION = 1
"""zlib level; low, because a client waits."""

_WORTH_COMPRESSING = 1024
"""Bytes of body below which gzip is not used."""


@dataclass(frozen=True)
class Picture:
    """Body and headers of a response."""

    content: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


def answer(
    segmenter: Segmenter,
    encoding: Encoding,
    vocabulary: Vocabulary,
    form: Format,
    confidence: bool = True,
    *,
    threshold: float = 0.0,
    colours: Mapping[str, str] | None = None,
    compressed: bool = False,
) -> Picture:
    """Segment and return the response; without `confidence`, a map has labels only. PNGs are always compressed.

    Pixels of less confidence than `threshold`, in [0, 1], are unlabelled.
    `colours` are those that an overlay gives to words, "#rrggbb"; the others have the palette's.

    Raises UserError, one line, for words that the model cannot read.
    """
    segmentation = segmenter.segment(encoding, vocabulary, threshold=threshold)
    if form is Format.labels:
        return Picture(_labels(segmentation), MEDIA_TYPES[form])
    if form is Format.overlay:
        return Picture(_overlay(segmentation, colours or {}), MEDIA_TYPES[form])
    if form is Format.json:
        content = _json(segmentation)
    else:
        content = _map(segmentation, confidence, segmenter.unseen_texts(vocabulary))
    headers = {"Vary": "Accept-Encoding"}
    if compressed and len(content) >= _WORTH_COMPRESSING:
        content = gzip.compress(content, _FAST_COMPRESSION)
        headers["Content-Encoding"] = "gzip"
    return Picture(content, MEDIA_TYPES[form], headers)


def _json(segmentation: Segmentation) -> bytes:
    """Return the JSON that `opensan segment` writes: see `outputs.record`."""
    record = outputs.record(
        segmentation.labels,
        segmentation.names,
        segmentation.areas,
        segmentation.confidence,
        segmentation.vocabulary.to_dict(),
        segmentation.encoding.model,
        segmentation.about_confidence(),
    )
    return _dumped(record)


def _labels(segmentation: Segmentation) -> bytes:
    return _png(outputs.label_map_picture(segmentation.labels, len(segmentation.names)))


def _overlay(segmentation: Segmentation, chosen: Mapping[str, str]) -> bytes:
    names = segmentation.names
    colours = outputs.palette(len(names))
    for index, name in enumerate(names):
        if name in chosen:
            colours[index] = list(bytes.fromhex(chosen[name].removeprefix("#")))
    return _png(outputs.overlay(segmentation.image, segmentation.labels, names, segmentation.areas, colours))


def _map(segmentation: Segmentation, with_confidence: bool, unseen: Sequence[str]) -> bytes:
    """Return a map that a page draws itself: a JSON header, then an index and a confidence for each pixel.

    4 bytes: length of the header, little-endian, a multiple of 4. The header: width, height, bytes_per_label (1 or 2),
    unlabelled (the value of pixels that no word got), words (name, index, area, confidence, colour), unseen (the words
    and synonyms that the model never read). Then H x W labels, little-endian, row by row; then, if wanted, H x W
    confidences, a byte each, 255 for 1.
    """
    labels, names = segmentation.labels, segmentation.names
    confidence = segmentation.confidence if with_confidence else None
    height, width = labels.shape
    wide = len(names) > 255
    areas = segmentation.areas
    means: list[float | None] = [None] * len(names)
    if confidence is not None:
        means = outputs.mean_confidence(labels, confidence, len(names))
    colours = outputs.palette(len(names))
    header = {
        "width": width,
        "height": height,
        "bytes_per_label": 2 if wide else 1,
        "unlabelled": 65_535 if wide else 255,
        "words": [
            {
                "name": name,
                "index": index,
                "area": areas[name],
                "confidence": None if mean is None else round(mean, 4),
                "colour": "#" + bytes(colours[index]).hex(),
            }
            for index, (name, mean) in enumerate(zip(names, means, strict=True))
        ],
        "unseen": list(unseen),
    }
    text = _dumped(header)
    text += b" " * (-len(text) % 4)
    return b"".join(
        (
            len(text).to_bytes(4, "little"),
            text,
            labels.astype("<u2" if wide else np.uint8).tobytes(),  # -1 becomes the highest value
            b"" if confidence is None else (confidence * 255 + 0.5).astype(np.uint8).tobytes(),
        )
    )


def point(segmenter: Segmenter, encoding: Encoding, vocabulary: Vocabulary, x: int, y: int) -> PointAnswer:
    """Explain the pixel in column `x` and row `y`. Raises Problem (422) if the image has no such pixel.

    Raises ValueError, one line, for a model that has no mask proposals.
    """
    segmenter = with_proposals(segmenter, "an explanation of a pixel")
    try:
        check_pixel(encoding.sizes, x, y)
    except UserError as error:
        raise Problem(422, str(error)) from None
    probabilities = to_array(segmenter.class_probabilities(encoding, vocabulary))
    explanation = explain_pixel(to_array(encoding["mask_logits"]), probabilities, encoding.sizes, vocabulary, x, y)
    return PointAnswer(
        x=x,
        y=y,
        words=[PointWord(**vars(word)) for word in explanation.words],
        proposals=[
            PointProposal(
                index=proposal.index,
                share=proposal.share,
                mask=proposal.mask,
                word_probability=proposal.word_probability,
                word=proposal.word,
                picture=base64.b64encode(_png(_grey(proposal.picture))).decode("ascii"),
            )
            for proposal in explanation.proposals
        ],
    )


def _grey(mask: np.ndarray) -> Image.Image:
    """Return a mask in [0, 1] as a grey picture, to stretch over the image."""
    return Image.fromarray((mask * 255).round().astype(np.uint8))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=_FAST_COMPRESSION)
    return file.getvalue()


def _dumped(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
