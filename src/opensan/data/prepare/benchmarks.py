"""Read the six benchmarks of SAN's evaluation, from the folders that their authors distribute.

Formats: Caesar, Uijlings, Ferrari, CVPR 2018 (COCO-Stuff); Everingham et al., IJCV 2010 (VOC); Mottaghi et al., CVPR
2014 (Pascal Context); Zhou et al., CVPR 2017 (ADE20K).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from opensan.data.prepare import full_ade, raw
from opensan.data.prepare.source import Reader, Source, SourceImage
from opensan.errors import UserError, reason
from opensan.vocabulary import Vocabulary


def _source(
    label_set: str,
    source_images: Iterable[SourceImage],
    folder: Path,
    needs: str,
    incomplete: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    source_images = list(source_images)
    if not source_images:
        missing = "; ".join(incomplete.values())
        raise _incomplete(folder, needs, *([missing] if missing else []))
    return Source(
        Vocabulary.ready(label_set), source_images, evaluation_split="val", label_set=label_set, incomplete=incomplete
    )


def _incomplete(folder: Path, needs: str, missing: str = "no images with labels") -> UserError:
    return UserError(f"{folder}: {missing}; {needs}")


def _two_folders(images: Path, labels: Path, split: str, label_set: str) -> Iterator[SourceImage]:
    """Yield images X.jpg with labels X.png; if one of the two is missing, the engine reports it."""
    for stem in sorted(raw.stems(images, ".jpg") | raw.stems(labels, ".png")):
        yield SourceImage(
            stem, (split,), images / f"{stem}.jpg", partial(raw.index_labels, labels / f"{stem}.png", label_set)
        )


# COCO-Stuff

COCO_NEEDS = (
    "it must hold train2017/ and val2017/ (or images/train2017/ and so on) with the images, and "
    "stuffthingmaps_trainval2017.zip unpacked in stuffthingmaps/ (stuffthingmaps/train2017/ and val2017/); "
    "one split may be left out"
)


def open_coco_stuff(folder: Path) -> Source:
    """Open COCO-Stuff 164k."""

    def source_images() -> Iterator[SourceImage]:
        for split, part in (("train", "train2017"), ("val", "val2017")):
            images = raw.find(folder, f"images/{part}", part)
            places = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
            labels = raw.find(folder, *(f"{parent}/{part}" for parent in places))
            if images and labels:
                yield from _two_folders(images, labels, split, "coco_stuff_171")
            elif there := images or labels:
                there = there.relative_to(folder)
                incomplete[split] = f"there is {there}/ without its {'labels' if images else 'images'}"

    incomplete: dict[str, str] = {}
    return _source("coco_stuff_171", source_images(), folder, COCO_NEEDS, incomplete)


# Pascal VOC 2012

VOC_NEEDS = (
    "it must be VOCdevkit/VOC2012 (or hold it), with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
)


def open_voc(folder: Path) -> Source:
    """Open Pascal VOC 2012."""
    root = raw.find(folder, "VOCdevkit/VOC2012", "VOC2012") or folder
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt"):
        if not (root / part).exists():
            raise _incomplete(root, VOC_NEEDS, f"there is no {part}")

    def source_images() -> Iterator[SourceImage]:
        for split in ("train", "val"):
            if (listed := root / f"ImageSets/Segmentation/{split}.txt").exists():
                for name in raw.read_list(listed):
                    labels = partial(raw.index_labels, root / f"SegmentationClass/{name}.png", "pascal_voc_20")
                    yield SourceImage(name, (split,), root / f"JPEGImages/{name}.jpg", labels)

    return _source("pascal_voc_20", source_images(), root, VOC_NEEDS)


# Pascal Context

CONTEXT_NEEDS = (
    "it must be VOCdevkit/VOC2010 (or hold it), with JPEGImages/, the .mat files of trainval.tar.gz in trainval/, and "
    "the split lists: trainval_merged.json, or train.txt and val.txt (pascalcontext_val.txt) with a name a line"
)


def open_context(label_set: str, folder: Path) -> Source:
    """Open Pascal Context with the classes of `label_set`."""
    root = raw.find(folder, "VOCdevkit/VOC2010", "VOC2010") or folder
    labels = raw.find(root, "trainval") or raw.find(folder, "trainval")
    if labels is None or not (root / "JPEGImages").is_dir():
        raise _incomplete(root, CONTEXT_NEEDS, f"there is no {'JPEGImages' if labels else 'trainval'}")

    def source_images() -> Iterator[SourceImage]:
        for split, names in _context_splits(root, folder).items():
            for name in names:
                values = partial(_label_map, labels / f"{name}.mat", label_set)
                yield SourceImage(name, (split,), root / f"JPEGImages/{name}.jpg", values)

    return _source(label_set, source_images(), root, CONTEXT_NEEDS)


def _context_splits(*folders: Path) -> dict[str, list[str]]:
    """Return split -> names, from the first of `folders` that has lists: the JSON's, or those made from it."""
    for folder in folders:
        if path := raw.find(folder, "trainval_merged.json"):
            return _splits_of_json(path)
        lists = {
            split: raw.find(
                folder, f"{split}.txt", f"pascalcontext_{split}.txt", f"ImageSets/SegmentationContext/{split}.txt"
            )
            for split in ("train", "val")
        }
        if any(lists.values()):
            return {split: raw.read_list(path) for split, path in lists.items() if path}
    raise _incomplete(folders[0], CONTEXT_NEEDS, "there are no split lists")


def _splits_of_json(path: Path) -> dict[str, list[str]]:
    """Read the lists in trainval_merged.json: file_name and phase of each of "images".

    Only that part is parsed: the whole file, masks and all, would take gigabytes.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    for start in re.finditer(r'"images"\s*:\s*(?=\[)', text):
        try:
            images, _ = json.JSONDecoder().raw_decode(text, start.end())
            splits: dict[str, list[str]] = {"train": [], "val": []}
            for image in images:
                if image["phase"] in splits:
                    splits[image["phase"]].append(image["file_name"].removesuffix(".jpg"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # another list of that name
        if any(splits.values()):
            return splits
    raise UserError(f"{path}: holds no list of images with file_name and phase (train, val)")


def _label_map(path: Path, label_set: str) -> np.ndarray:
    """Read the labels of a .mat file."""
    from scipy.io import loadmat

    try:
        with path.open("rb") as file:
            values = loadmat(file, variable_names=["LabelMap"])["LabelMap"]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such label file") from None
    except KeyError:
        raise UserError(f"{path}: holds no LabelMap") from None
    except Exception as error:  # a damaged .mat can fail in any way: TypeError, zlib.error, struct.error, ...
        raise UserError(f"{path}: not a readable .mat file ({reason(error)})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "ui" or not values.size:
        raise UserError(f"{path}: its LabelMap is not a matrix of whole numbers")
    return raw.labels_of(values, raw.table_of(label_set), path)


# ADE20K, 150 classes

ADE_NEEDS = (
    "it must be ADEChallengeData2016 (or hold it), with images/training/, images/validation/, annotations/training/ "
    "and annotations/validation/; one split may be left out"
)


def open_ade(folder: Path) -> Source:
    """Open ADE20K's scene parsing challenge."""
    root = raw.find(folder, "ADEChallengeData2016") or folder

    def source_images() -> Iterator[SourceImage]:
        for split, part in (("train", "training"), ("val", "validation")):
            images, labels = root / "images" / part, root / "annotations" / part
            if images.is_dir() and labels.is_dir():
                yield from _two_folders(images, labels, split, "ade20k_150")
            elif images.is_dir() or labels.is_dir():
                incomplete[split] = f"of images/{part}/ and annotations/{part}/ one is missing"

    incomplete: dict[str, str] = {}
    return _source("ade20k_150", source_images(), root, ADE_NEEDS, incomplete)


_CONTEXT: dict[str, Any] = dict(
    needs=CONTEXT_NEEDS,
    obtained=(
        "images: http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ (VOCtrainval_03-May-2010.tar); labels: "
        "https://cs.stanford.edu/~roozbeh/pascal-context/ (trainval.tar.gz); trainval_merged.json: the PASCAL in "
        "Detail challenge, https://sites.google.com/view/pasd/dataset"
    ),
    terms="photographs under Flickr's terms",
    expected={"train": 4_998, "val": 5_105},
    fewer={"val": 5_104},
)
_ADE_TERMS = "research and education, non-commercial"

READERS = (
    Reader(
        name="coco_stuff_171",
        description="COCO-Stuff 164k, 171 things and stuff, on which SAN is trained",
        open=open_coco_stuff,
        needs=COCO_NEEDS,
        obtained=(
            "images: https://cocodataset.org/#download (train2017.zip, val2017.zip); labels: "
            "https://github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)"
        ),
        terms="labels CC BY 4.0, photographs under Flickr's terms",
        classes=171,
        expected={"train": 118_287, "val": 5_000},
    ),
    Reader(
        name="pascal_voc_20",
        description="Pascal VOC 2012, 20 objects, background unlabelled",
        open=open_voc,
        needs=VOC_NEEDS,
        obtained="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval_11-May-2012.tar)",
        terms="photographs under Flickr's terms",
        classes=20,
        expected={"train": 1_464, "val": 1_449},
    ),
    Reader(
        name="pascal_context_59",
        description="Pascal Context, its 59 frequent classes",
        open=partial(open_context, "pascal_context_59"),
        classes=59,
        **_CONTEXT,
    ),
    Reader(
        name="pascal_context_459",
        description="Pascal Context, all 459 classes",
        open=partial(open_context, "pascal_context_459"),
        classes=459,
        **_CONTEXT,
    ),
    Reader(
        name="ade20k_150",
        description="ADE20K's scene parsing challenge 2016, 150 classes",
        open=open_ade,
        needs=ADE_NEEDS,
        obtained="http://sceneparsing.csail.mit.edu/ (ADEChallengeData2016.zip)",
        terms=_ADE_TERMS,
        classes=150,
        expected={"train": 20_210, "val": 2_000},
    ),
    Reader(
        name="ade20k_847",
        description="ADE20K of 2021 in full, 847 classes, scaled to short sides of 512",
        open=full_ade.open_full_ade,
        needs=full_ade.NEEDS,
        obtained="https://ade20k.csail.mit.edu/ (ADE20K_2021_17_01.zip, after registration)",
        terms=_ADE_TERMS,
        classes=847,
        expected={"train": 25_574, "val": 2_000},
    ),
)
