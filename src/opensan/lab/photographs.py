"""Train the lab's small CLIP and SAN on real photographs: CLIP from captions, SAN from one data set's masks.

    python -m opensan.lab.photographs clip --data DIR --out runs/photo-clip
    python -m opensan.lab.photographs san --data DIR --clip runs/photo-clip --out runs/photo-san

DIR holds label folders `camvid` and `labelmefacade` (see `opensan.data.segmentation_folder`) and, if wanted,
`flickr8k_small` (images/, captions.tsv of "file TAB caption", train.txt). The SAN is trained on CamVid's training
photographs alone; LabelMeFacade is never trained on, and its words "door", "window" and "vegetation" have no masks.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opensan.checkpoints import load_folder, save_folder
from opensan.config import ClipConfig, ImageConfig, SideAdapterConfig, TextConfig, VisionConfig
from opensan.data.augment import AugmentConfig, augment
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.evaluation.evaluation import dataset_predictor, evaluate, validation
from opensan.evaluation.report import write_report
from opensan.images import open_image
from opensan.lab.clip_training import (
    RECOGNITION_LAYER,
    ClipTask,
    clip_groups,
    collate_captions,
    contrast,
    logit_scale,
    read_windows,
    save_clip,
)
from opensan.lab.informed_start import informed_start
from opensan.lab.san_training import LabSanConfig, build_lab_san
from opensan.lab.scene_pictures import Picture, ScenePictures, WindowBatch, tokens
from opensan.model import SAN
from opensan.model.backbones.clip_vit import ClipModel
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.loop import Trainer
from opensan.train.san import normalise, train_san

PHOTO_CLIP = ClipConfig(
    embed_dim=192,
    quick_gelu=False,
    vision=VisionConfig(width=192, layers=6, heads=6, patch_size=16, image_size=256),
    text=TextConfig(width=128, layers=3, heads=4),
)
PICTURE_SIDE = 128
"""Pixels of the square pictures that the CLIP learns from."""

CLIP_LOOP = LoopConfig(
    steps=500,
    batch_size=128,
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup=60,
    clip_norm=1.0,
    save_every=50,
    log_every=10,
)

WINDOW_LOOP = LoopConfig(
    steps=600,
    batch_size=12,
    learning_rate=5e-4,
    weight_decay=0.1,
    warmup=30,
    clip_norm=1.0,
    seed=1,
    save_every=50,
    log_every=10,
)

PATCH = PHOTO_CLIP.vision.patch_size
GRID = PHOTO_CLIP.vision.image_size // PATCH
WINDOWS = 5
"""Windows in each image."""

WINDOW_VIEW = AugmentConfig(short_sides=(256, 320, 384, 448), crop=(GRID * PATCH, GRID * PATCH))

PHOTO_SAN = LabSanConfig(
    name="photographs",
    training=SanTrainingConfig(
        loop=LoopConfig(
            steps=900,
            batch_size=8,
            learning_rate=1e-3,
            warmup=50,
            save_every=50,
            log_every=20,
            validate_every=300,
        ),
        augment=AugmentConfig(short_sides=tuple(range(256, 513, 32)), crop=(256, 256)),
        points=PointsConfig(count=1_536),
    ),
    side_adapter=SideAdapterConfig(
        width=144,
        depth=6,
        heads=3,
        patch_size=16,
        image_size=320,
        queries=40,
        fusion={0: 0, 1: 1, 2: 2, 3: 3},
        supervised_blocks=(5, 6),
        mask_channels=128,
        mlp_channels=192,
    ),
    clip_scale=0.8,
    image=ImageConfig(short_side=320, long_side=1_280),
)

Captioned = tuple[np.ndarray, str]
"""An image [H, W, 3] uint8 and its caption."""


class CaptionedPhotographs:
    """A folder of photographs with several captions each (a `TrainingSource`)."""

    def __init__(self, root: Path, split: str = "train") -> None:
        captions = defaultdict(list)
        for line in (root / "captions.tsv").read_text(encoding="utf-8").splitlines():
            file, _, text = line.partition("\t")
            captions[file].append(text)
        self.files = (root / f"{split}.txt").read_text(encoding="utf-8").split()
        self.captions = captions
        self.images = root / "images"
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def load(self, index: int, generator: np.random.Generator) -> Captioned:
        if index not in self._kept:
            self._kept[index] = open_image(self.images / self.files[index])
        shortest = min(self._kept[index].shape[:2])
        side = int(generator.integers(int(0.7 * shortest), shortest + 1))
        texts = self.captions[self.files[index]]
        return _square(self._kept[index], side, generator), texts[int(generator.integers(len(texts)))]


class CaptionedCrops:
    """Crops of labelled photographs; the classes that a crop shows make its caption (a `TrainingSource`)."""

    LEAST_SHARE = 0.1

    def __init__(self, dataset: SegmentationFolder) -> None:
        self.dataset = dataset
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def load(self, index: int, generator: np.random.Generator) -> Captioned:
        if index not in self._kept:
            self._kept[index] = self.dataset[index]
        image, labels = self._kept[index]
        side = int(generator.integers(64, min(labels.shape) + 1))
        both = np.dstack([image, labels.astype(np.uint8)])  # -1 becomes 255
        top, left = (int(generator.integers(whole - side + 1)) for whole in labels.shape)
        crop = both[top : top + side, left : left + side]
        names = self.dataset.vocabulary.names
        shares = np.bincount(crop[..., 3].ravel(), minlength=256)[: len(names)] / crop[..., 3].size
        shown = [names[i] for i in np.argsort(-shares) if shares[i] >= self.LEAST_SHARE] or [names[shares.argmax()]]
        text = f"a photo of a {' and a '.join(generator.permutation(shown).tolist())}."
        return _square(crop[..., :3], side, generator), text


def _square(image: np.ndarray, side: int, generator: np.random.Generator) -> np.ndarray:
    """Cut a random square of `side` pixels, resize it to PICTURE_SIDE, and flip it half of the time."""
    top, left = (int(generator.integers(whole - side + 1)) for whole in image.shape[:2])
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    resized = np.asarray(crop.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR))
    return resized[:, ::-1] if generator.random() < 0.5 else resized


class EvenMixture:
    """Sample several sources equally often, whatever their sizes (a `TrainingSource`)."""

    def __init__(self, sources: Sequence) -> None:
        self.sources = sources
        self.longest = max(map(len, sources))

    def __len__(self) -> int:
        return self.longest * len(self.sources)

    def _at(self, index: int) -> tuple:
        position, source = divmod(index, len(self.sources))
        return self.sources[source], position % len(self.sources[source])

    def name(self, index: int) -> str:
        source, position = self._at(index)
        return source.name(position)

    def load(self, index: int, generator: np.random.Generator) -> Captioned:
        source, position = self._at(index)
        return source.load(position, generator)

    collate = staticmethod(collate_captions)


class PhotographWindows:
    """Photographs with windows and a caption for each window, as `SceneTask` needs them (a `TrainingSource`).

    A labelled photograph gives rectangles around pixels of its words; a captioned one gives itself, once a caption.
    """

    def __init__(self, labelled: SegmentationFolder, captioned: CaptionedPhotographs | None) -> None:
        self.labelled = labelled
        self.captioned = captioned

    def __len__(self) -> int:
        return len(self.labelled) * (1 if self.captioned is None else 2)

    def name(self, index: int) -> str:
        return self.labelled.name(index % len(self.labelled))

    def load(self, index: int, generator: np.random.Generator) -> Picture:
        if index < len(self.labelled):
            return self._rectangles(*augment(*self.labelled[index], WINDOW_VIEW, generator), generator)
        assert self.captioned is not None
        position = int(generator.integers(len(self.captioned)))
        loaded = [self.captioned.load(position, generator) for _ in range(WINDOWS)]
        image = Image.fromarray(np.ascontiguousarray(loaded[0][0])).resize(WINDOW_VIEW.crop, Image.Resampling.BILINEAR)
        whole = np.ones((WINDOWS, GRID, GRID), dtype=bool)
        return np.asarray(image), whole, [tokens(text) for _, text in loaded], []

    def _rectangles(self, image: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> Picture:
        names = self.labelled.vocabulary.names
        present = np.unique(labels[labels >= 0])
        windows = np.zeros((WINDOWS, GRID, GRID), dtype=bool)
        texts = []
        for window in windows:
            wanted = int(generator.choice(present)) if len(present) else -1
            ys, xs = np.nonzero(labels == wanted)
            pixel = int(generator.integers(len(ys)))
            row, column = int(ys[pixel]) // PATCH, int(xs[pixel]) // PATCH
            up, down, left, right = (int(reach) for reach in generator.integers(0, 4, 4))
            rows = slice(max(0, row - up), row + down + 1)
            columns = slice(max(0, column - left), column + right + 1)
            window[rows, columns] = True
            seen = labels[np.kron(window, np.ones((PATCH, PATCH), dtype=bool))]
            shares = np.bincount(seen[seen >= 0], minlength=len(names)) / len(seen)
            shown = [i for i in np.argsort(-shares) if shares[i] >= 0.2 or (i == wanted and shares[i] >= 0.08)]
            words = generator.permutation([names[i] for i in shown or [int(shares.argmax())]]).tolist()
            texts.append(tokens(f"a photo of a {' and a '.join(words)}."))
        return image, windows, texts, []

    collate = staticmethod(ScenePictures.collate)


class WindowTask(nn.Module):
    """Contrastive loss between windows and captions, as in `SceneTask` but without a teacher and false captions."""

    def __init__(self, clip: ClipModel, image: ImageConfig) -> None:
        super().__init__()
        self.clip = clip
        self.image = image

    def prepare(self, batches: Sequence[WindowBatch]) -> None:
        """Return nothing: the micro-batches of a step share no value."""

    def forward(self, batch: WindowBatch, prepared: None) -> dict[str, Tensor]:
        features = self.clip.shallow_features(normalise(batch.images, self.image), RECOGNITION_LAYER, ())
        images = read_windows(self.clip, features, batch.windows).flatten(0, 1)
        captions = self.clip.embed_prompts(batch.tokens)
        return contrast(logit_scale(self.clip) * images @ captions.T, batch.tokens, None)


def train_photo_clip(data: Path, out: Path, *, flickr: bool) -> None:
    """Train a CLIP on captions of CamVid crops and (if `flickr`) Flickr8k images, then on windows. Resumes."""
    camvid = SegmentationFolder(data / "camvid", "train")
    captioned = CaptionedPhotographs(data / "flickr8k_small") if flickr else None
    source = EvenMixture([CaptionedCrops(camvid), *([captioned] if captioned else [])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = ClipModel(PHOTO_CLIP).requires_grad_(True)
    generator = np.random.default_rng(0)
    pictures = [source.load(int(index), generator)[0] for index in generator.integers(len(source), size=600)]
    informed_start(clip.visual, pictures, ImageConfig())
    stages = (
        ("run", CLIP_LOOP, ClipTask(clip, ImageConfig()), source),
        ("windows", WINDOW_LOOP, WindowTask(clip, ImageConfig()), PhotographWindows(camvid, captioned)),
    )
    for name, loop, task, stage_source in stages:
        groups = clip_groups(clip, loop.learning_rate, loop.weight_decay)
        if not Trainer(task, stage_source, groups, loop, out / name).run().finished:
            return
        save_clip(clip.eval(), PHOTO_CLIP, out)


def train_photo_san(data: Path, clip: Path, out: Path, config: LabSanConfig = PHOTO_SAN) -> None:
    """Train on CamVid's training split, validate on its validation split, save `out`/model and reports. Resumes."""
    model = build_lab_san(clip, config)
    watch = validation(model, SegmentationFolder(data / "camvid", "val"), limit=25)
    result = train_san(
        model, SegmentationFolder(data / "camvid", "train"), config.training, out / "run", validate=watch
    )
    if result.finished:
        save_folder(model, out / "model")
        report(data, out)


def report(data: Path, out: Path) -> None:
    """Evaluate `out`/model on the test split of both data sets and write a report of each."""
    model: SAN = load_folder(out / "model")
    for name in ("camvid", "labelmefacade"):
        dataset = SegmentationFolder(data / name, "test")
        evaluation = evaluate(dataset_predictor(model, dataset), dataset)
        write_report(evaluation, out / f"report-{name}", title=f"{name}, test", about={"trained on": "CamVid, train"})
        print(f"{name:14} mIoU {100 * evaluation.metrics.miou:.2f} %")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("clip", "san", "report"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clip", type=Path, help="the folder that `clip` wrote (for `san`)")
    parser.add_argument("--no-flickr", action="store_true", help="captions of CamVid crops only (for `clip`)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "clip":
        train_photo_clip(options.data, options.out, flickr=not options.no_flickr)
    elif options.command == "san":
        if options.clip is None:
            parser.error("san needs --clip")
        train_photo_san(options.data, options.clip, options.out)
    else:
        report(options.data, options.out)


if __name__ == "__main__":
    main()
