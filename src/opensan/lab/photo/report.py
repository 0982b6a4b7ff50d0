"""The tests of `photo`: photographs that it was never trained on, and sets that it was never trained on.

Where everything else counts as background ("things"), words of BACKGROUND are asked too; they take pixels and are
reported as background, and the mean is over the words themselves.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensan.checkpoints import load_model
from opensan.data.dataset import SegmentationDataset
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.evaluation.evaluation import Predictor, evaluate, model_predictor
from opensan.files import write_text
from opensan.lab.photo.sets import BACKGROUND, NOVEL, SETS, VOC_WORDS, PhotoSet
from opensan.model import SAN
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import UNLABELLED, Vocabulary


class Joined:
    """Several data sets of the same words as one (a `SegmentationDataset`)."""

    def __init__(self, parts: Sequence[PhotoSet]) -> None:
        self.parts = parts
        self.vocabulary = parts[0].vocabulary
        self._at = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, number = self._at[index]
        return part[number]

    def name(self, index: int) -> str:
        part, number = self._at[index]
        return part.name(number)


@dataclass(frozen=True)
class Test:
    """Photographs and the words to ask."""

    dataset: SegmentationDataset
    words: tuple[str, ...]
    """The words that are reported."""
    absorbing: tuple[str, ...] = ()
    """Asked too; what they win counts as background, the data set's last class."""
    ask: dict[str, str] = field(default_factory=dict)
    """Word -> what the model is asked instead, for names that nobody would type."""


_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair dryer,toothbrush"
)
COCO_WORDS = tuple(_COCO.split(","))
PET_WORDS = ("cat", "dog")
ANIMALS = ("bear", "deer", "elephant", "otter", "tiger", "turtle")


def tests(root: Path) -> dict[str, Callable[[], Test]]:
    """Return the tests by name; photographs are listed when one is called."""

    def everyday(words: Sequence[str], splits: Sequence[tuple[str, str]]) -> Test:
        parts = [PhotoSet(root, name, split, words=words, background=True) for name, split in splits]
        others = [word for word in (*BACKGROUND, *COCO_WORDS) if word not in words]
        return Test(Joined(parts), tuple(words), tuple(others))

    def things(name: str, words: Sequence[str]) -> Test:
        others = tuple(word for word in BACKGROUND if word not in words)
        return Test(PhotoSet(root, name, "test", words=words, background=True), tuple(words), others)

    def dense(name: str) -> Test:
        dropped = SETS[name].also
        full = PhotoSet(root, name, "test")
        own = [word for word in full.vocabulary.names if word not in dropped]
        return Test(PhotoSet(root, name, "test", words=own), tuple(own))

    def folder(name: str, split: str) -> Test:
        dataset = SegmentationFolder(root / name, split)
        return Test(dataset, tuple(dataset.vocabulary.names))

    held_out = (("coco_small", "test"), ("coco_mini", "test"))
    return {
        "val-voc": lambda: everyday(VOC_WORDS, [("coco_small", "val")]),
        "voc": lambda: everyday(VOC_WORDS, held_out),
        "coco": lambda: everyday(COCO_WORDS, held_out),
        "pets": lambda: things("pets", PET_WORDS),
        "animals": lambda: things("animals", ANIMALS),
        "facades": lambda: dense("facades"),
        "camvid": lambda: folder("camvid", "test"),
        "labelmefacade": lambda: folder("labelmefacade", "test"),
    }


def measure(predictor: Callable[[Vocabulary, int], Predictor], test: Test, limit: int | None = None) -> dict:
    """Mean IoU, IoU of each word, and the means over base and NOVEL words.

    `predictor(vocabulary, words)` answers labels below `words`, or -1, for a photograph (`model_predictor`).
    """
    asked = [*test.words, *test.absorbing]
    predict = predictor(Vocabulary.parse(asked), len(test.words))
    if test.absorbing:
        plain = predict

        def predict(image: np.ndarray) -> np.ndarray:
            labels = plain(image)
            return np.where(labels == UNLABELLED, len(test.words), labels)

    evaluation = evaluate(predict, test.dataset, limit=limit)
    assert not evaluation.broken, evaluation.broken[0]
    ious = {
        scores.name: scores.iou for scores in evaluation.metrics.classes if scores.name in test.words and scores.pixels
    }
    novel = [iou for word, iou in ious.items() if word in NOVEL]
    base = [iou for word, iou in ious.items() if word not in NOVEL]
    return {
        "photographs": evaluation.images,
        "miou": _mean(list(ious.values())),
        "base": _mean(base),
        "novel": _mean(novel),
        "pixel_accuracy": evaluation.metrics.pixel_accuracy,
        "iou": {word: round(iou, 4) for word, iou in ious.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def model_words(model: SAN) -> Callable[[Vocabulary, int], Predictor]:
    """Return a function for `measure` that asks a model with its own text tower."""
    encoder = TextEncoder(model, disk_cache=False)
    return lambda vocabulary, words: model_predictor(model, encoder.classifier(vocabulary), words)


def report(model: str, root: Path, out: Path, only: Sequence[str] = ()) -> None:
    """Measure `model` (as `opensan.load` takes it) on every test, and write `out`/figures.json as they come.

    `only`: names of tests (see `tests`), to measure these alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictor = model_words(load_model(model))
    figures = {}
    for name, listed in tests(root).items():
        if name not in only and (only or name.startswith("val")):
            continue
        figures[name] = measure(predictor, listed())
        known = {kind: figures[name][kind] for kind in _KINDS if figures[name][kind] is not None}
        shown = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in known.items())
        print(f"{name:14} {figures[name]['photographs']:4} photographs: {shown}", flush=True)
        write_text(out / "figures.json", json.dumps(figures, indent=1) + "\n")


_KINDS = ("miou", "base", "novel", "pixel_accuracy")
