"""Collect what a trained side adapter proposes on the labelled photographs: features under masks, masks and labels.

Letters: Q queries, h w a grid of every 16th pixel, P = h w its points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensan.files import atomic_path
from opensan.images import prepare
from opensan.lab.photo.sets import PhotoSet
from opensan.model import SAN
from opensan.model.backbones.efficientnet_lite import EfficientNetLiteModel
from opensan.vocabulary import UNLABELLED

STRIDE = 16
OTHER_SIDES = (320, 448)
"""Short sides, in pixels, at which photographs are read mirrored, in turn; they are also read as they are."""


@dataclass(frozen=True)
class Proposed:
    """The proposals of one photograph."""

    means: Tensor
    """[Q, 1280]: mean features of the tower under each proposal, as recognition reads them."""
    masks: Tensor
    """[Q, P] in [0, 1]."""
    labels: Tensor
    """[P] int64: numbers of the data set's words; negative: not labelled."""


@torch.no_grad()
def propose(model: SAN, image: np.ndarray, labels: np.ndarray, short_side: int) -> Proposed:
    """Return the proposals of `image` [H, W, 3] uint8 with `labels` [H, W]."""
    assert isinstance(model.clip, EfficientNetLiteModel)
    prepared = prepare(image, model.config.image.model_copy(update={"short_side": short_side}))
    seen: list[Tensor] = []
    with model.clip.projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])):
        proposals = model.propose(torch.as_tensor(prepared.pixels)[None])
    (height, width), padded = (
        [side // STRIDE for side in sides] for sides in (prepared.sizes.network, prepared.sizes.padded)
    )
    logits = F.interpolate(proposals.mask_logits, size=padded, mode="bilinear", align_corners=False)[0]
    coarse = F.interpolate(torch.from_numpy(np.array(labels, dtype=np.float32))[None, None], size=(height, width))
    return Proposed(seen[0][0], logits[:, :height, :width].sigmoid().flatten(1), coarse.flatten().long())


def collect_proposals(model: SAN, dataset: PhotoSet, most: int, mirrored: bool, out: Path) -> list[Proposed]:
    """Return the proposals of at most `most` photographs, evenly spread over the set; kept in the file `out`.

    With `mirrored` each photograph comes twice, the second time mirrored and at another size.
    """
    if not out.exists():
        count = min(most, len(dataset))
        tensors: dict[str, Tensor] = {}
        for number, index in enumerate(step * len(dataset) // count for step in range(count)):
            image, labels = dataset[index]
            views = [(image, labels, model.config.image.short_side)]
            if mirrored:
                flipped = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(labels[:, ::-1])
                views.append((*flipped, OTHER_SIDES[number % len(OTHER_SIDES)]))
            for view, inputs in enumerate(views):
                proposed, name = propose(model, *inputs), f"{number * len(views) + view:05}"
                tensors |= {f"{name}.means": proposed.means.half(), f"{name}.masks": proposed.masks.half()}
                tensors[f"{name}.labels"] = proposed.labels.short()
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as path:
            save_file(tensors, path)
    return _read(load_file(out))


def _read(tensors: Mapping[str, Tensor]) -> list[Proposed]:
    names = sorted({name.split(".")[0] for name in tensors})
    means, masks, labels = ([tensors[f"{name}.{part}"] for name in names] for part in ("means", "masks", "labels"))
    return [Proposed(*values) for values in zip(means, masks, (values.long() for values in labels), strict=True)]


def present(labels: Sequence[Tensor], words: int) -> Tensor:
    """Mark [N, words] the words that each of N photographs shows."""
    shown = torch.zeros(len(labels), words, dtype=torch.bool)
    for row, own in zip(shown, labels, strict=True):
        row[own[own > UNLABELLED].unique()] = True
    return shown
