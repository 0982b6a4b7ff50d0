"""The labelled photographs that `photo` is trained and tested on, with their words renamed to everyday ones.

A folder holds images/NAME.jpg, labels/NAME.png (value = line of classes.txt, 255 unlabelled) and classes.txt. What a
set leaves unlabelled is not a class: its value becomes -1. The masks of NOVEL words are never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from opensan.data.segmentation_folder import read_labelled
from opensan.vocabulary import UNLABELLED, Vocabulary

_NOVEL = "zebra,elephant,bus,laptop,pizza,umbrella,bear,keyboard,boat,sheep,deer,otter,tiger,turtle"
NOVEL = tuple(_NOVEL.split(","))
"""Words whose masks are in no training set: known by name only."""

_VOC = (
    "airplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,horse,motorcycle,person,potted plant,"
    "sheep,couch,train,tv"
)
VOC_WORDS = tuple(_VOC.split(","))
"""Pascal VOC's 20 classes by COCO's names for them."""

BACKGROUND = (
    "sky", "cloud", "wall", "floor", "ceiling", "ground", "road", "pavement", "grass", "tree", "plant", "water", "sea",
    "sand", "snow", "rock", "mountain", "building", "house", "window", "door", "fence", "curtain", "cabinet", "shelf",
    "carpet", "field",
)  # fmt: skip
"""Words that take up what no word of COCO names, in tests where the background counts."""


HIDDEN = -3
"""The label of NOVEL words' pixels in training: unlabelled, and nothing is said of what they are not either."""


@dataclass(frozen=True)
class SetSpec:
    """How a folder's classes are renamed and its photographs divided."""

    folder: str
    rename: dict[str, str | None] = field(default_factory=dict)
    """Class -> word; None: unlabelled. Classes that are not listed keep their names."""
    only: str | None = None
    """If set, every class but the first becomes this word."""
    also: tuple[str, ...] = ()
    """Words that its photographs certainly do not show: what the class loss may compare with."""
    group: Callable[[str], str] = str
    """Photographs of one group stand on the same side of a split."""
    runs: bool = False
    """Video frames: the split is by place in the sequence."""


_STUFF = {
    "background": None, "street sign": "sign", "eye glasses": "glasses", "building-other": "building",
    "ceiling-other": "ceiling", "ceiling-tile": "ceiling", "clouds": "cloud", "desk-stuff": "desk",
    "door-stuff": "door", "floor-marble": "floor", "floor-other": "floor", "floor-stone": "floor",
    "floor-tile": "floor", "floor-wood": "floor", "food-other": "food", "furniture-other": "furniture",
    "ground-other": "ground", "mirror-stuff": "mirror", "plant-other": "plant", "playingfield": "playing field",
    "sky-other": "sky", "solid-other": None, "structural-other": None, "textile-other": "cloth",
    "wall-brick": "wall", "wall-concrete": "wall", "wall-other": "wall", "wall-panel": "wall", "wall-stone": "wall",
    "wall-tile": "wall", "wall-wood": "wall", "water-other": "water", "window-blind": "window",
    "window-other": "window", "skyscraper": "building", "metal": None, "plastic": None, "fog": "sky", "wood": None,
    "waterdrops": "water", "light": "lamp", "hair drier": "hair dryer", "rug": "carpet",
}  # fmt: skip

_OUTDOORS = ("sky", "road", "pavement", "grass", "tree", "building", "mountain", "sea", "snow", "sand")
_INDOORS = ("wall", "floor", "ceiling", "curtain", "cabinet", "door", "window")
_THINGS = ("person", "dog", "cat", "bird", "horse", "airplane", "train", "couch", "bed", "tv", "sandwich", "bottle")

SETS = {
    "coco_small": SetSpec("coco_small", {"background": None, "hair drier": "hair dryer"}, also=_OUTDOORS + _INDOORS),
    "coco_mini": SetSpec("coco_mini", {"background": None, "hair drier": "hair dryer"}, also=_OUTDOORS + _INDOORS),
    "coco_stuff": SetSpec("coco_stuff_few", _STUFF),
    "pets": SetSpec(
        "pets",
        {"background": None},
        also=("person", "horse", "cow", "bird", "teddy bear", *_OUTDOORS, *_INDOORS, "couch", "bed", "chair"),
    ),
    "facades": SetSpec(
        "facades_roboflow",
        {
            "unlabelled": None, "facade": "building", "street": "road", "vegetation": "tree",
            "non-building-infrastructure": None, "traffic-infrastructure": "pole", "balcony-fence": "balcony",
        },
        also=("sky", "grass", "water", *_THINGS, "truck", "floor"),
        group=lambda name: name.split("_scaled")[0],
    ),
    "library": SetSpec(
        "tqb_library",
        {"background": None, "glasses": "window", "bin": "trash can"},
        also=(*_THINGS, *_OUTDOORS),
        runs=True,
    ),
    "corridor": SetSpec(
        "dhcn_corridor", {"background": None, "stair": "stairs"}, also=(*_THINGS, *_OUTDOORS), runs=True
    ),
    "campus": SetSpec(
        "lums_road",
        {"background": None, "sidewalk": "pavement", "speedbreaker": "speed bump", "obstacle": None},
        also=("sky", "tree", "grass", "building", "wall", "water", "floor", *_THINGS),
        runs=True,
    ),
    "people": SetSpec(
        "clothing_coparsing",
        {"background": None},
        only="person",
        also=("dog", "cat", "bird", "horse", "chair", "car", "bottle", *_OUTDOORS, *_INDOORS),
    ),
    "animals": SetSpec("animals6", {"background": None}),
    "clothing": SetSpec(
        "clothing_coparsing", {"background": None, "accessories": None}, also=("wall", "road", "tree", "building")
    ),
}  # fmt: skip


@cache
def divided(root: Path, name: str) -> dict[str, list[str]]:
    """Divide the photographs' names into "train", "val" and "test"; parts of one photograph stay together."""
    spec = SETS[name]
    folder = root / spec.folder
    names = sorted(file.stem for file in (folder / "images").iterdir())
    if name == "coco_mini":
        train = [line.split(".")[0] for line in (folder / "tiny_train.txt").read_text("utf-8").split()]
        return {"train": sorted(train), "val": [], "test": sorted(set(names) - set(train))}
    if name == "coco_stuff":
        return {"train": names, "val": [], "test": []}
    if name == "animals":
        return {"train": [], "val": [], "test": names}
    if name in ("people", "clothing"):
        test = [line.split(".")[0] for line in (folder / "test.txt").read_text("utf-8").split()]
        return {"train": sorted(set(names) - set(test)), "val": [], "test": sorted(test)}
    if spec.runs:
        end = len(names) * 85 // 100
        return {"train": names[: end - 2], "val": [], "test": names[end:]}
    groups = sorted({spec.group(name) for name in names})
    # Every fourth group is for testing and, of those of COCO, every tenth of the others for choosing settings.
    side = {group: "test" if index % 4 == 3 else "train" for index, group in enumerate(groups)}
    if name == "coco_small":
        others = sorted(group for group, where in side.items() if where == "train")
        side |= {group: "val" for index, group in enumerate(others) if index % 7 == 3}
        # Photographs that the stuff labels show too are trained on there.
        side |= {group: "train" for group in divided(root, "coco_stuff")["train"] if group in side}
    elif name != "pets":
        side = {group: "test" if index % 6 == 3 else "train" for index, group in enumerate(groups)}
    return {split: [name for name in names if side[spec.group(name)] == split] for split in ("train", "val", "test")}


class PhotoSet:
    """Photographs of a split with the words that they are labelled with (a `SegmentationDataset`)."""

    def __init__(
        self,
        root: Path,
        name: str,
        split: str,
        *,
        words: Sequence[str] | None = None,
        masks_of_novel: bool = True,
        background: bool = False,
    ) -> None:
        """Read the lists.

        Args:
            root: the folder of all sets.
            name: of a set in SETS.
            split: "train", "val" or "test".
            words: the words that count (default: all of the set's, and those that it certainly does not show).
            masks_of_novel: without it, pixels of NOVEL words are unlabelled, and those words are left out.
            background: what no word has is a class of its own, the last one, "background" (all but 255).
        """
        spec = SETS[name]
        self.folder = root / spec.folder
        self.names = divided(root, name)[split]
        classes = (self.folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        renamed = [spec.rename.get(name, spec.only or name) for name in classes]
        if words is None:
            own = dict.fromkeys(word for word in (*renamed, *spec.also) if word is not None)
            words = [word for word in own if masks_of_novel or word not in NOVEL]
        self.vocabulary = Vocabulary.parse([*words, *(["background"] if background else [])])
        index_of = {word: index for index, word in enumerate(words)}
        rest = len(words) if background else UNLABELLED
        values = [rest if word is None else index_of.get(word, rest) for word in renamed]
        if not masks_of_novel:
            values = [HIDDEN if word in NOVEL else value for word, value in zip(renamed, values, strict=True)]
        self._label_of_value = np.array(values, dtype=np.int16)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.names[index]
        image, labels = (self.folder / kind / f"{name}.{end}" for kind, end in (("images", "jpg"), ("labels", "png")))
        return read_labelled(image, labels, self._label_of_value)
