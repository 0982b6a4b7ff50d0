"""A space that photographs and words share, from the ImageNet classifier and from regions with a name.

The space has the directions of image features in which the classifier's rows differ most, and one more coordinate. A
word's point is the mean of its classes' rows: "dog" lies amid all breeds, "vehicle" amid cars and ships. The labelled
sets' words are then shifted towards the features under their masks, those that ImageNet knows only as far as it pays;
NOVEL words have no regions and stay. Nothing else is fitted: letting the projection imitate the classifier on
photographs made NOVEL words worse.

Letters: N samples, K words, D embedding.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensan.files import atomic_paths
from opensan.lab.photo.sets import NOVEL
from opensan.lab.photo.wordnet import ImageNetWords
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup

DIMENSION = 384
LOOP = LoopConfig(
    steps=400, batch_size=384, learning_rate=2e-3, warmup=20, clip_norm=None, save_every=100, log_every=50
)
SCALE = 30.0
"""Factor of the cosines."""
CONSTANT = 0.7
"""The last coordinate of what is seen, before it is normalised, in median lengths of the others. Words have 0 there: it
is room for "no object", and weak features are near no word."""
REGION_NOISE = 0.1
"""Relative deviation of the features of regions, each time they are seen."""
STAY = 0.01
"""Weight of the shifts of words that ImageNet knows: a few regions must not outweigh a thousand photographs."""
FOOD_THRESHOLD = 10.0
"""The logit at which a tag is as likely as not."""
NARROWER_STEPS = 2
WIDEST = 60
"""A word that ImageNet has no class for ("sedan") is another name for what is at most so many steps wider ("car"),
unless that has more classes than this."""
FOOD_WORDS = 160
"""So many of the most frequent tags of food become words."""

# What ImageNet calls otherwise, by common knowledge of its classes: word -> its classes' (first) names.
CLASSES_OF = {
    "person": "ballplayer,groom,scuba diver",
    "cow": "ox,water buffalo",
    "sheep": "ram,bighorn",
    "horse": "sorrel",
    "tiger": "tiger",
    "bear": "brown bear,American black bear,ice bear,sloth bear",
    "elephant": "Indian elephant,African elephant,tusker",
    "deer": "impala,hartebeest,gazelle",
    "turtle": "loggerhead,leatherback turtle,mud turtle,terrapin,box turtle",
    "train": "bullet train,electric locomotive,steam locomotive,passenger car,freight car",
    "bus": "school bus,trolleybus,minibus",
    "boat": "canoe,fireboat,gondola,lifeboat,speedboat,yawl,catamaran,trimaran,schooner",
    "car": "beach wagon,cab,convertible,jeep,limousine,minivan,racer,sports car",
    "tv": "television,screen,monitor,home theater",
    "couch": "studio couch",
    "cell phone": "cellular telephone",
    "laptop": "laptop,notebook",
    "keyboard": "computer keyboard,typewriter keyboard",
    "wine glass": "goblet,red wine",
    "cup": "cup,coffee mug",
    "sink": "washbasin",
    "toilet": "toilet seat",
    "skis": "ski",
    "sports ball": "soccer ball,volleyball,basketball,tennis ball,rugby ball,croquet ball",
    "handbag": "purse,mailbag",
    "hair dryer": "hand blower",
    "teddy bear": "teddy",
    "hot dog": "hotdog",
    "donut": "bagel",
    "potted plant": "pot",
    "tennis racket": "racket",
    "oven": "microwave,stove,rotisserie",
    "sea": "seashore,sandbar",
    "shelf": "bookcase",
    "stop sign": "street sign",
    "sign": "street sign",
    "plate": "plate",
    "glasses": "sunglass,sunglasses",
    "house": "palace,mobile home,barn,boathouse",
    "bridge": "suspension bridge,steel arch bridge,viaduct",
    "otter": "otter",
    "traffic light": "traffic light",
}

# Words that may be said of the same region: none is a wrong answer for another.
ALIKE = (
    "building,house,skyscraper,wall,window,door,roof,balcony,shop,structure",
    "wall,ceiling,door,window,curtain,mirror,picture,cabinet",
    "road,pavement,ground,dirt,gravel,platform,railroad,floor,speed bump,sand,mud,stone",
    "floor,carpet,mat,ground,stone",
    "tree,bush,plant,leaves,branch,grass,moss,flower,potted plant,straw",
    "sky,cloud,fog",
    "water,sea,river,lake",
    "mountain,hill,rock,snow,stone",
    "table,dining table,desk,counter,furniture,chair,bench,couch,bed,cabinet,cupboard,shelf",
    "cabinet,cupboard,shelf,furniture,counter,oven,refrigerator,microwave,sink",
    "fence,railing,cage,balcony,stairs",
    "cloth,clothes,blanket,towel,pillow,curtain,napkin,bed,carpet,mat,banner,couch",
    "person,tie,backpack,handbag,clothes,skateboard,snowboard,skis,surfboard,tennis racket,baseball bat,baseball glove,"
    "frisbee,cell phone,hat,shoe,glasses",
    "bowl,cup,bottle,wine glass,vase,plate,dining table,table,food,salad,vegetable,fruit,broccoli,carrot,apple,orange,"
    "banana,sandwich,pizza,hot dog,donut,cake,fork,knife,spoon",
    "car,truck,bus",
    "tv,laptop,keyboard,mouse,remote,cell phone,desk",
    "sign,stop sign,street sign,banner,pole,traffic light",
    "potted plant,vase,flower,plant",
    "book,paper,cardboard,shelf",
    "bicycle,motorcycle,person",
    "bench,chair,stairs",
    "elevator,door",
    "bear,teddy bear",
)


@dataclass(frozen=True)
class Lexicon:
    """Every word, and which of ImageNet's classes it stands for."""

    words: list[str]
    """The labelled sets' words first, then ImageNet's, then those of titles and tags."""
    classes: list[tuple[int, ...]]
    """The classifier's rows below each word; () for words that ImageNet does not know."""
    names: dict[int, list[str]]
    """Word number -> other names for the same."""
    own: int
    """How many words at the beginning are the labelled sets'."""

    def numbers(self) -> dict[str, int]:
        """Word number by every name."""
        others = {name: number for number, names in self.names.items() for name in names}
        return others | {word: number for number, word in enumerate(self.words)}


def lexicon(imagenet: ImageNetWords, set_words: Iterable[str], food: Sequence[list[str]]) -> Lexicon:
    """Collect words; ambiguous names stay with the first who has them."""
    rows_of_classes = reversed(list(enumerate(imagenet.classes)))
    first_names = {imagenet.wordnet.synsets[offset].lemmas[0]: row for row, offset in rows_of_classes}
    words: list[str] = []
    classes: list[tuple[int, ...]] = []
    names: dict[int, list[str]] = {}
    taken: set[str] = set()

    def add(word: str, rows: tuple[int, ...], others: Iterable[str] = ()) -> None:
        number = len(words)
        words.append(word)
        classes.append(rows)
        names[number] = [other for other in dict.fromkeys(others) if other not in taken and other != word]
        taken.update([word, *names[number]])

    wanted = list(dict.fromkeys(set_words))
    for word in dict.fromkeys([*wanted, *CLASSES_OF]):
        meaning = imagenet.meaning.get(word)
        if word in CLASSES_OF:
            rows = tuple(first_names[name] for name in CLASSES_OF[word].split(","))
        else:
            rows = imagenet.below[meaning] if meaning else ()
        if word == "plant" or len(rows) > 200:
            rows = ()
        add(word, rows, [name for name in SYNONYMS.get(word, ()) if name not in wanted])
    labelled = len(words)
    for offset, rows in sorted(imagenet.below.items(), key=lambda pair: (len(pair[1]), pair[0])):
        synset = imagenet.wordnet.synsets[offset]
        own = [lemma.lower() for lemma in synset.lemmas]
        named = [word for word in own if word not in taken and imagenet.meaning[word] == offset]
        if named:
            add(named[0], rows, named[1:])
    for word in food_words(food):
        if word not in taken:
            add(word, ())
    number_of = {
        imagenet.meaning[word]: number
        for number, word in reversed(list(enumerate(words)))
        if word in imagenet.meaning and classes[number] and word != "person"  # which has more trades than all else
    }
    for word in sorted(imagenet.wordnet.in_use - taken):
        wider = imagenet.wider(word, NARROWER_STEPS)
        if wider is not None and wider in number_of and len(imagenet.below[wider]) <= WIDEST:
            names[number_of[wider]].append(word)
    return Lexicon(words, classes, names, labelled)


SYNONYMS = {
    "person": ("people", "man", "woman", "boy", "girl", "child", "pedestrian", "human", "someone", "player", "rider"),
    "car": ("automobile", "vehicle"),
    "bicycle": ("bike", "bicyclist", "cyclist"),
    "motorcycle": ("motorbike",),
    "airplane": ("plane", "aeroplane", "aircraft", "jet"),
    "tv": ("television", "tv monitor", "tvmonitor", "monitor", "screen"),
    "couch": ("sofa",),
    "dining table": ("diningtable",),
    "potted plant": ("pottedplant", "houseplant"),
    "cell phone": ("mobile phone", "phone", "smartphone"),
    "cow": ("cattle", "bull"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy", "doggy"),
    "sheep": ("ewe",),
    "horse": ("pony",),
    "pavement": ("sidewalk", "footpath"),
    "road": ("street", "asphalt", "lane"),
    "building": ("facade", "skyscraper", "buildings"),
    "tree": ("vegetation", "trees", "foliage"),
    "grass": ("lawn", "meadow"),
    "sea": ("ocean",),
    "sky": ("skies",),
    "floor": ("flooring",),
    "stop sign": ("stopsign",),
    "sign": ("sign symbol", "traffic sign", "street sign"),
    "pole": ("post", "column", "pillar"),
    "trash can": ("bin", "garbage can", "dustbin"),
    "cup": ("mug", "coffee cup"),
    "donut": ("doughnut",),
    "hair dryer": ("hair drier",),
    "refrigerator": ("fridge",),
    "boat": ("ship",),
    "toilet": ("toilet bowl",),
    "handbag": ("purse",),
    "stairs": ("staircase", "stair", "stairway"),
    "carpet": ("rug",),
    "lamp": ("light",),
    "shoe": ("shoes",),
    "clothes": ("clothing",),
    "sand": ("beach",),
    "mountain": ("mountains",),
    "rock": ("rocks",),
    "flower": ("flowers",),
    "fence": ("fencing",),
    "sandwich": ("burger",),
}


def food_words(food: Sequence[list[str]]) -> list[str]:
    """Return the most frequent tags and words of titles."""
    counts: Counter[str] = Counter()
    for said in food:
        counts.update({word for text in said for word in _tag_words(text)})
    return [word for word, count in counts.most_common(FOOD_WORDS) if count >= 4]


def tags_of(food: Sequence[list[str]], tags: Sequence[str]) -> np.ndarray:
    """Mark [photographs, tags] the words that a photograph's title or tags have."""
    said = [{word for text in texts for word in _tag_words(text)} for texts in food]
    return np.array([[tag in spoken for tag in tags] for spoken in said])


def _tag_words(text: str) -> list[str]:
    words = [word for word in re.findall(r"[a-z]+", text) if len(word) > 2 and word not in STOP]
    return [*words, text] if " " in text and len(text.split()) == 2 else words


STOP = {"and", "with", "the", "for", "from", "food", "fresh", "homemade", "delicious", "day", "lunch", "dinner", "best"}


class WordSpace(nn.Module):
    """The projection and the words' points."""

    weight: Tensor
    bias: Tensor
    start: Tensor
    known: Tensor
    of_words: Tensor

    def __init__(self, weight: Tensor, words: Lexicon, features: Tensor) -> None:
        """`weight` [1000, 1280] of the classifier; `features` [N, 1280] of windows of photographs."""
        super().__init__()
        mean = features.mean(0)
        rows = weight - weight.mean(0)  # what all rows share decides nothing between them
        directions = torch.linalg.svd(rows, full_matrices=False).Vh[: DIMENSION - 1]  # that keep most of every logit
        length = (directions @ (features - mean).T).norm(dim=0).median()
        self.register_buffer("weight", F.pad(directions, (0, 0, 0, 1)))
        self.register_buffer("bias", torch.cat([-directions @ mean, CONSTANT * length.view(1)]))
        points = F.normalize(rows @ self.weight.T, dim=-1)
        generator = torch.Generator().manual_seed(0)
        start = [
            points[list(classes)].mean(0) if classes else F.pad(torch.randn(DIMENSION - 1, generator=generator), (0, 1))
            for classes in words.classes
        ]
        self.register_buffer("start", F.normalize(torch.stack(start), dim=-1))
        self.register_buffer("known", torch.tensor([bool(classes) for classes in words.classes]))
        self.register_buffer("of_words", F.pad(torch.ones(DIMENSION - 1), (0, 1)))
        self.shift = nn.Parameter(torch.zeros_like(self.start))

    def logits(self, features: Tensor, numbers: Tensor) -> Tensor:
        """Compare features [N, 1280] with the words `numbers` [K]: [N, K]."""
        return SCALE * F.normalize(F.linear(features, self.weight, self.bias), dim=-1) @ self.points(numbers).T

    def points(self, numbers: Tensor) -> Tensor:
        """Return the words' points [K, D], unit length."""
        return F.normalize((self.start[numbers] + self.shift[numbers]) * self.of_words, dim=-1)

    def shifted(self) -> Tensor:
        """Sum the squared shifts of the words that ImageNet knows."""
        return self.shift[self.known].square().sum()


@dataclass(frozen=True)
class WordPoints:
    """The fitted space."""

    weight: Tensor
    """[D, 1280] of the projection."""
    bias: Tensor
    """[D] of the projection."""
    scale: Tensor
    """The factor of cosines; a scalar."""
    table: Tensor
    """[K, D], unit rows: the words' points."""
    lexicon: Lexicon

    @classmethod
    def of(cls, space: WordSpace, lexicon: Lexicon) -> "WordPoints":
        """Copy what `space` holds now."""
        table = space.points(torch.arange(len(space.start))).detach()
        return cls(space.weight, space.bias, torch.tensor(SCALE), table, lexicon)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Return the points of words, by any of their names: [len(names), D]."""
        numbers = self.lexicon.numbers()
        return self.table[[numbers[name] for name in names]]

    def save(self, folder: Path) -> None:
        """Write words.safetensors and words.json."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_paths(folder / "words.json", folder / "words.safetensors") as (described, tensors):
            described.write_text(json.dumps(asdict(self.lexicon)), encoding="utf-8")
            save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, tensors)

    @classmethod
    def load(cls, folder: Path) -> "WordPoints":
        """Read what `save` wrote."""
        data = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        lexicon = Lexicon(
            data["words"],
            [tuple(rows) for rows in data["classes"]],
            {int(number): names for number, names in data["names"].items()},
            data["own"],
        )
        return cls(**load_file(folder / "words.safetensors"), lexicon=lexicon)


_TENSORS = ("weight", "bias", "scale", "table")


def may_be_compared(words: Sequence[str]) -> np.ndarray:
    """Mark [K, K] the columns that are wrong answers for a region called as the row (or right: the diagonal)."""
    index_of = {word: index for index, word in enumerate(words)}
    compared = np.ones((len(words), len(words)), dtype=bool)
    for group in ALIKE:
        members = [index_of[word] for word in group.split(",") if word in index_of]
        compared[np.ix_(members, members)] = False
    compared[:, [index_of[word] for word in NOVEL if word in index_of]] = False
    np.fill_diagonal(compared, True)
    return compared


@dataclass(frozen=True)
class WordBatch:
    """Features, and what is known of them."""

    regions: Tensor
    """[N, 1280]."""
    names: Tensor
    """[N] int64: columns of the words that have regions."""
    food: Tensor
    """[N, 1280]."""
    tagged: Tensor
    """[N, tags] bool: whether the photograph's title or tags have the word."""

    def to(self, device: torch.device) -> "WordBatch":
        """Return the same on `device`."""
        return WordBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class FeatureSamples:
    """Regions, and photographs of food, one of each a sample (a `TrainingSource`)."""

    def __init__(self, regions: np.ndarray, names: np.ndarray, food: np.ndarray, tagged: np.ndarray) -> None:
        """Arrays as in `WordBatch`, of all samples. Rare names are drawn nearly as often as frequent ones."""
        self.arrays = regions, names, food, tagged
        chance = (np.bincount(names) ** -0.6)[names]
        self._limits = np.cumsum(chance / chance.sum())

    def __len__(self) -> int:
        return len(self.arrays[0])

    def name(self, index: int) -> str:
        return f"region {index}"

    def load(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
        regions, names, food, tagged = self.arrays
        region = min(int(np.searchsorted(self._limits, generator.random())), len(names) - 1)
        photograph = int(generator.integers(len(food)))
        return regions[region], names[region], food[photograph], tagged[photograph]

    def collate(self, samples: list[tuple[np.ndarray, ...]]) -> WordBatch:
        regions, names, food, tagged = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
        return WordBatch(regions.float(), names, food.float(), tagged)


class WordTask(nn.Module):
    """The losses of the space, as the head of the file has them."""

    def __init__(self, space: WordSpace, words: Lexicon, region_words: Sequence[str], tags: Sequence[str]) -> None:
        """`region_words`: the columns of `WordBatch.names`; `tags`: those of `tagged`."""
        super().__init__()
        self.space = space
        number = words.numbers()
        self.region_numbers = torch.tensor([number[word] for word in region_words])
        self.tag_numbers = torch.tensor([number[word] for word in tags])
        self.compared = torch.from_numpy(may_be_compared(region_words))

    def prepare(self, batches: Sequence[WordBatch]) -> None:
        """Share nothing between the micro-batches of a step."""

    def forward(self, batch: WordBatch, prepared: None) -> dict[str, Tensor]:
        regions = batch.regions * (1 + REGION_NOISE * torch.randn(batch.regions.shape))
        logits = self.space.logits(regions, self.region_numbers)
        logits = logits.masked_fill(~self.compared[batch.names], -torch.inf)
        eaten = self.space.logits(batch.food, self.tag_numbers) - FOOD_THRESHOLD
        return {
            "loss_regions": F.cross_entropy(logits, batch.names),
            "loss_shift": STAY * self.space.shifted(),
            "loss_food": 2 * F.binary_cross_entropy_with_logits(eaten, batch.tagged.float()),
        }


def fit(task: WordTask, samples: FeatureSamples, out: Path, loop: LoopConfig = LOOP) -> bool:
    """Fit `task.space` in place; True when it has come to its end. Resumes."""
    group = ParameterGroup(("shift",), (task.space.shift,), loop.learning_rate, 0.0)
    return Trainer(task, samples, [group], loop, out).run().finished


def load_food(path: Path) -> tuple[np.ndarray, list[list[str]]]:
    """Features of whole photographs [N, 1280], and what is said of each."""
    with np.load(path) as data:
        return data["regions"], [json.loads(line) for line in data["words"].tolist()]
