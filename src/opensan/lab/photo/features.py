"""Features of the frozen image tower: of regions with a name, and of windows without one.

Both are means of the last feature map over positions, [1280], as the ImageNet classifier reads them.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from opensan.files import atomic_path
from opensan.images import open_image
from opensan.lab.photo.sets import SETS, PhotoSet
from opensan.model.backbones.efficientnet_lite import EfficientNetLite

SHORT_SIDES = (256, 352)
"""Pixels: photographs of COCO are read at both sizes, once mirrored; the others at one."""
MOST_PHOTOGRAPHS = 150
"""Photographs that are read of every other set: they are much alike."""
LEAST_CELLS = 0.6
"""Regions smaller than this share of one position are left out."""
WINDOWS = 10
MEAN, STD = 127.0, 128.0


@dataclass(frozen=True)
class Regions:
    """Features with names."""

    features: np.ndarray
    """[N, 1280] float16."""
    words: list[str]
    sets: list[str]


def feature_map(tower: EfficientNetLite, image: np.ndarray, short_side: int) -> torch.Tensor:
    """Return the last features [1280, h, w] of `image` [H, W, 3] uint8, resized to a short side of so many pixels."""
    scale = short_side / min(image.shape[:2])
    size = tuple(max(32, round(side * scale / 32) * 32) for side in image.shape[1::-1])
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pixels = (torch.from_numpy(resized.copy()).permute(2, 0, 1).float() - MEAN) / STD
    with torch.inference_mode():
        pixels = pixels.unsqueeze(0).to(tower.head.weight.dtype, memory_format=torch.channels_last)
        return tower.features(tower(pixels)[32])[0].float()


def region_means(features: torch.Tensor, labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return (label, mean feature [1280] float16) of every label >= 0 in `labels` [H, W] that is large enough."""
    regions = []
    for label in np.unique(labels[labels >= 0]).tolist():
        mask = torch.from_numpy(labels == label).float()[None, None]
        share = F.adaptive_avg_pool2d(mask, (features.shape[1], features.shape[2]))[0, 0]
        if share.sum() >= LEAST_CELLS:
            mean = (features * share).flatten(1).sum(1) / share.sum()
            regions.append((label, mean.half().numpy()))
    return regions


def window_means(features: torch.Tensor, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the mean over the whole map, and means over random windows."""
    height, width = features.shape[1:]
    means = [features.mean((1, 2)).half().numpy()]
    for _ in range(WINDOWS):
        rows, columns = (int(generator.integers(1, max(2, side * 2 // 3))) for side in (height, width))
        top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
        means.append(features[:, top : top + rows, left : left + columns].mean((1, 2)).half().numpy())
    return means


def collect(tower: EfficientNetLite, root: Path, name: str, split: str, out: Path) -> None:
    """Write the features of a set's photographs to `out` (an .npz), unless they are there."""
    if out.exists():
        return
    dataset = PhotoSet(root, name, split, masks_of_novel=split != "train")
    generator = np.random.default_rng(0)
    regions, words, windows = [], [], []
    rich = name.startswith("coco")
    for index in range(0, len(dataset), 1 if rich else -(-len(dataset) // MOST_PHOTOGRAPHS)):
        image, labels = dataset[index]
        for number, side in enumerate(SHORT_SIDES):
            if not rich and number != (index // 2) % 2:
                continue
            if number == index % 2:
                image, labels = image[:, ::-1], labels[:, ::-1]
            features = feature_map(tower, np.ascontiguousarray(image), side)
            for label, mean in region_means(features, labels):
                regions.append(mean)
                words.append(dataset.vocabulary.names[label])
            windows.extend(window_means(features, generator))
    _save(out, regions=np.stack(regions), words=np.array(words), windows=np.stack(windows))


def collect_food(tower: EfficientNetLite, root: Path, out: Path) -> None:
    """Write features of photographs with a title and tags but no masks: "words" are JSON lists, one a photograph."""
    if out.exists():
        return
    folder = root / "food_named"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(0)
    whole, said, windows = [], [], []
    for index, (name, record) in enumerate(sorted(meta.items())[::2]):
        image = open_image(folder / "images" / f"{name}.jpg")
        image = np.ascontiguousarray(image[:, ::-1]) if index % 2 else image
        features = feature_map(tower, image, SHORT_SIDES[index % 2])
        means = window_means(features, generator)
        windows.extend(means)
        whole.append(means[0])
        said.append(json.dumps([(record["title"] or "").lower(), *(tag.lower() for tag in record["tags"] or ())]))
    _save(out, regions=np.stack(whole), words=np.array(said), windows=np.stack(windows))


def _save(out: Path, **arrays: np.ndarray) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as path, path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def collect_all(tower: EfficientNetLite, root: Path, out: Path) -> None:
    """Write features of all sets' training photographs, one file a set; what exists is kept."""
    tower = deepcopy(tower).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for name in SETS:
        if name not in ("clothing", "animals"):
            collect(tower, root, name, "train", out / f"{name}-train.npz")
            print(f"features of {name}", flush=True)
    collect_food(tower, root, out / "food.npz")
