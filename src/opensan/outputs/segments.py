"""Make the files of an image's segments: a picture of their numbers, and a record with boxes and masks."""

from typing import Any

import numpy as np
from PIL import Image

from opensan import __version__
from opensan.assemble.segments import Segments
from opensan.outputs.coco import run_lengths


def segments_picture(ids: np.ndarray) -> Image.Image:
    """Return numbers of segments [H, W] (0 for none) as COCO's panoptic format has them: R + 256 G + 65536 B."""
    return Image.fromarray(np.stack([(ids >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)], axis=-1))


def segments_record(segments: Segments, model: str) -> dict[str, Any]:
    """Return the segments as plain data: `Segments.to_dict`, and the mask (COCO RLE) of each as "rle"."""
    height, width = segments.ids.shape
    masks = run_lengths(segments.ids - 1, len(segments))
    data = segments.to_dict()
    data["segments"] = [entry | {"rle": masks[entry["id"] - 1]} for entry in data["segments"]]
    about = {"format": 1, "opensan": __version__, "model": model, "image": {"width": width, "height": height}}
    return about | data
