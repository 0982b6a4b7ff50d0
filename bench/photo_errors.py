"""Where does `photo` lose its pixels: in masks, in names, or where ground is taken for things?

    python bench/photo_errors.py --model photo --data DIR

On the photographs of coco_small that its recipe keeps for choosing settings, with the words of the tests "voc" and
"coco" (`opensan.lab.photo.report`), at every third pixel. Each line puts the truth for a part, or changes the masks:

- *truth: ground or thing*: only words of the right kind compete at a pixel; ground is right by any of its words.
- *truth: the words shown*: things that the photograph does not show are not asked.
- *truth: names*: each mask's own pixels (where it is the strongest) get the label that most of them have.
- *truth: masks*: each labelled thing is recognised by the mean of the features inside it.
- *masks times F plus O*: the same names, and mask logits changed so.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.checkpoints import load_model
from opensan.images import prepare
from opensan.lab.photo.names import word_rows
from opensan.lab.photo.report import COCO_WORDS
from opensan.lab.photo.sets import BACKGROUND, VOC_WORDS, PhotoSet
from opensan.model import SAN
from opensan.model.backbones.efficientnet_lite import EfficientNetLiteModel

THINGS = (*VOC_WORDS, *(word for word in COCO_WORDS if word not in VOC_WORDS))
WORDS = (*THINGS, *(word for word in BACKGROUND if word not in THINGS))
GROUND = -1
STEP = 3
SIZES = (0, 0.01, 0.05, 0.2, 1)
CHANGES = ((1.0, 0.0), (2.0, 0.0), (2.0, -1.0), (2.0, -2.0), (3.0, -2.0), (4.0, -3.0))


@dataclass(frozen=True)
class Photograph:
    """What the model proposes on a photograph, and the truth."""

    logits: Tensor
    """[Q, H, W] of masks."""
    probabilities: Tensor
    """[Q, K] of the words."""
    truth: Tensor
    """[H, W]: number of a word of THINGS, or GROUND."""
    inside: dict[int, Tensor]
    """Thing -> probabilities [K] of the mean features inside it."""


@torch.no_grad()
def read(model: SAN, dataset: PhotoSet, rows: Tensor) -> Iterator[Photograph]:
    """Propose on every photograph of `dataset`; `rows` [K, D] of WORDS."""
    clip = model.clip
    assert isinstance(clip, EfficientNetLiteModel)
    scale, no_object = clip.logit_scale.exp(), model.no_object_row()
    named = [THINGS.index(name) if name in THINGS else GROUND for name in dataset.vocabulary.names]

    def named_by(embeddings: Tensor) -> Tensor:
        return (scale * embeddings @ torch.cat([rows, no_object]).T).softmax(-1)[..., :-1]

    for index in range(len(dataset)):
        image, labels = dataset[index]
        prepared = prepare(image, model.config.image)
        pixels = torch.as_tensor(prepared.pixels)[None]
        features = model.shallow_features(pixels)
        proposals = model.propose(pixels, features=features)
        known = torch.from_numpy(np.array(labels[1::STEP, 1::STEP], dtype=np.int64))
        truth = torch.where(known >= 0, torch.tensor([*named, GROUND])[known], GROUND)
        height, width = prepared.sizes.network
        fine = F.interpolate(proposals.mask_logits, prepared.sizes.padded, mode="bilinear", align_corners=False)
        logits = F.interpolate(fine[:, :, :height, :width], truth.shape, mode="bilinear", align_corners=False)[0]
        inside = {}
        for thing in sorted(set(truth.unique().tolist()) - {GROUND}):
            region = F.interpolate((truth == thing).float()[None, None], (height, width))
            padded = F.pad(region, (0, pixels.shape[3] - width, 0, pixels.shape[2] - height))
            share = F.adaptive_avg_pool2d(padded, features.grid).flatten()
            if share.sum() > 0:
                inside[thing] = named_by(clip.embed(share @ features.tokens[0] / share.sum()))
        yield Photograph(logits, named_by(proposals.mask_embeddings[0]), truth, inside)


def plain(photograph: Photograph, factor: float = 1.0, offset: float = 0.0) -> Tensor:
    """Return the scores of all words, [K, H, W], with mask logits times `factor` plus `offset`."""
    return torch.einsum("qk,qhw->khw", photograph.probabilities, (factor * photograph.logits + offset).sigmoid())


def changed_masks(photograph: Photograph, factor: float, offset: float) -> Tensor:
    return plain(photograph, factor, offset).argmax(0)


def ground_told(photograph: Photograph) -> Tensor:
    scores = plain(photograph)
    right_kind = (torch.arange(len(WORDS)) < len(THINGS))[:, None, None] == (photograph.truth >= 0)
    return scores.masked_fill(~right_kind, -1).argmax(0)


def shown_words(photograph: Photograph) -> Tensor:
    asked = torch.arange(len(WORDS)) >= len(THINGS)
    asked[sorted(set(photograph.truth.unique().tolist()) - {GROUND})] = True
    return plain(photograph).masked_fill(~asked[:, None, None], -1).argmax(0)


def true_names(photograph: Photograph) -> Tensor:
    owner = photograph.logits.argmax(0)
    answer = torch.full_like(photograph.truth, len(THINGS))
    for query in owner.unique():
        most = (photograph.truth[owner == query] + 1).bincount().argmax() - 1
        answer[owner == query] = most if most >= 0 else len(THINGS)
    return answer


def true_masks(photograph: Photograph) -> Tensor:
    answer = torch.full_like(photograph.truth, len(THINGS))
    for thing, probabilities in photograph.inside.items():
        answer[photograph.truth == thing] = probabilities.argmax()
    return answer


def best_masks(photograph: Photograph) -> Iterator[tuple[float, float]]:
    """Yield the share of the picture that a thing has, and the best IoU of a mask with it."""
    masks = photograph.logits > 0
    for thing in photograph.inside:
        region = photograph.truth == thing
        common, either = (pixels.flatten(1).sum(1) for pixels in (masks & region, masks | region))
        yield float(region.float().mean()), float((common / either).max())


def scores(photographs: list[Photograph], label: Callable[[Photograph], Tensor], words: int) -> tuple[float, float]:
    """Return mean IoU over the first `words` of THINGS, and the share of right pixels, in %; all else is one class."""
    table = torch.zeros(words + 1, words + 1, dtype=torch.int64)
    for photograph in photographs:
        answer = label(photograph).clamp(max=words)
        truth = torch.where(photograph.truth >= 0, photograph.truth, words).clamp(max=words)
        table += (truth * (words + 1) + answer).flatten().bincount(minlength=(words + 1) ** 2).view_as(table)
    right = table.diag()
    shown = table.sum(1)[:words] > 0
    iou = (right / (table.sum(0) + table.sum(1) - right).clamp(min=1))[:words]
    return 100 * float(iou[shown].mean()), 100 * float(right.sum() / table.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="photo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    photographs = list(read(model, PhotoSet(options.data, "coco_small", "val"), word_rows(model, WORDS)))
    ways: dict[str, Callable[[Photograph], Tensor]] = {
        "as it is": partial(changed_masks, factor=1.0, offset=0.0),
        "truth: ground or thing": ground_told,
        "truth: the words shown": shown_words,
        "truth: names": true_names,
        "truth: masks": true_masks,
    }
    for factor, offset in CHANGES:
        ways[f"masks times {factor:g} plus {offset:g}"] = partial(changed_masks, factor=factor, offset=offset)
    print("| | VOC-20 | pixels right | COCO-80 | pixels right |\n|---|---|---|---|---|")
    for name, label in ways.items():
        figures = [value for words in (len(VOC_WORDS), len(THINGS)) for value in scores(photographs, label, words)]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in figures) + " |", flush=True)
    print("\n| share of the picture | things | best IoU of a mask, mean | above a half |\n|---|---|---|---|")
    best = [pair for photograph in photographs for pair in best_masks(photograph)]
    for low, high in pairwise(SIZES):
        own = np.array([iou for share, iou in best if low <= share < high])
        print(f"| {low:.0%} to {high:.0%} | {len(own)} | {100 * own.mean():.0f} | {(own > 0.5).mean():.0%} |")


if __name__ == "__main__":
    main()
