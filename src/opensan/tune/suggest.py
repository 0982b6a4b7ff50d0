"""Find what suits a folder of images without labels: other texts for its words, other templates. It only suggests.

Two figures tell without labels how sure the answers are: the share of pixels whose word stays the same when the image
is mirrored or made smaller, and the margin between the two best words' shares of a pixel's score. A text is suggested
where both rise by more than the images differ among themselves. A word whose text fits nothing any more gives its
pixels to others, and both figures rise: so no change is suggested with which a word loses half of its pixels. Neither
figure knows what is right: docs/results.md says how often they were.
Letters: I images, V views, Q queries, K words, n pixels.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import masks_of_pixels
from opensan.errors import UserError, short
from opensan.files import ASSETS
from opensan.images import ImageSource, open_image, prepare_array
from opensan.segmenters.proposals import ProposalSegmenter
from opensan.segmenters.results import Encoding, InputImage
from opensan.tune.run import Progress
from opensan.vocabulary import TEMPLATE_SETS, Vocabulary, Word
from opensan.word_lists import read_text

SMALLER = 0.75
"""Factor of the smaller view's sides."""

GRID = 24
"""Pixels along each side of an image that are compared."""

LEAST = 0.005
"""Share of the pixels that a word must have for its loss to count."""

STYLES: Mapping[str, tuple[str, ...]] = {
    **TEMPLATE_SETS,
    "drawing": ("a drawing of a {}.", "a painting of a {}.", "a sketch of a {}."),
    "dark": ("a dark photo of a {}.", "a photo of a {} at night.", "a {} at dusk."),
    "blurred": ("a blurry photo of a {}.", "a low resolution photo of a {}."),
    "street": ("a photo of a {} in a street.", "a {} seen from a car.", "a street scene with a {}."),
    "indoors": ("a photo of a {} in a room.", "a {} inside a building."),
    "aerial": ("an aerial photo of a {}.", "a satellite image of a {}."),
}
"""Sets of templates that are tried: the ready ones, and some that say how images look."""


@dataclass(frozen=True)
class Change:
    """Another text for a word, or other templates for all, and what it does to the answers."""

    word: str
    """The word; "" for templates, which are of all words."""
    texts: tuple[str, ...]
    """Texts in the place of the word's own (several: the best one counts), or the templates."""
    origin: str
    """ "description", "yours", "synonym", "joined" or a set of templates."""
    agreement: float
    """By how much more pixels keep their word in other views, share of all; negative for fewer."""
    margin: float
    """By how much the margin grows, share of the score."""
    surely: tuple[float, float]
    """The lower ends of the 95 % intervals of both, over images."""
    area: float
    """The word's share of the pixels with it, in [0, 1]; 1 for templates."""
    moved: float
    """Share of the pixels that get another word."""
    loses: tuple[str, ...] = ()
    """Words that had pixels (LEAST of all) and lose more than half of them."""

    @property
    def suggested(self) -> bool:
        """Whether both figures rise by more than the images differ, and no word gives up its pixels for that."""
        return min(self.surely) > 0 and not self.loses

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            **vars(self),
            "texts": list(self.texts),
            "surely": list(self.surely),
            "loses": list(self.loses),
            "suggested": self.suggested,
        }


@dataclass(frozen=True)
class Suggestions:
    """Result of `suggest_words`."""

    words: Vocabulary
    """The words as asked for."""
    images: int
    agreement: float
    """Share of pixels that keep their word in other views, with the words as asked for."""
    margin: float
    """The margin with them."""
    changes: tuple[Change, ...]
    """All that was tried, by word, best margin first."""
    suggested: Vocabulary
    """The words with the best of the suggested changes of each; as asked for if there are none."""


@dataclass(frozen=True, eq=False)
class SeenImage:
    """An image in all its views, at the same pixels."""

    views: tuple[tuple[Encoding, np.ndarray], ...]
    """Encoding, and mask probabilities [n, Q] at the pixels; the image as it is comes first."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers of some words at the pixels of all images."""

    winners: np.ndarray
    """[I, n]."""
    agreement: np.ndarray
    """[I]."""
    margin: np.ndarray
    """[I]."""


def suggest_words(
    segmenter: ProposalSegmenter,
    images: Sequence[ImageSource],
    words: Vocabulary,
    *,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Suggestions:
    """Try other texts and templates for words on images without labels; see the module. Nothing is changed.

    Tried are each word's synonyms alone, the bundled descriptions and yours (alone, and joined to the word), and sets
    of templates, one change at a time.

    Args:
        segmenter: a model with mask proposals.
        images: what `Segmenter.encode` takes; some 10 to 50.
        words: the words, two or more.
        descriptions: texts for some of the words, beside the bundled ones.
        progress: called with the name of the step, how many parts are done, and how many there are.

    Raises:
        UserError: one line: no image, one word, or descriptions of a word that is not asked for.
    """
    if not images:
        raise UserError("no images: suggestions need some that show what the words are for")
    if len(words.words) < 2:
        raise UserError("one word gets every pixel, whatever its text: give the words of all that is there")
    for name in descriptions or {}:
        if words.find(name) is None:
            raise UserError(f"descriptions of {short(name)}, which is not among the words")
    seen = []
    for done, image in enumerate(images):
        progress("encoding images", done, len(images))
        seen.append(see(segmenter, open_image(image, max_pixels=segmenter.max_pixels)))
    own = answers_of(segmenter, seen, words)
    tried = list(_tried(words, descriptions or {}))
    changes = []
    for done, (word, texts, origin, changed) in enumerate(tried):
        progress("trying texts", done, len(tried))
        changes.append(_change(own, answers_of(segmenter, seen, changed), words, word, texts, origin))
    order = {word.name: place for place, word in enumerate(words.words)}
    changes.sort(key=lambda change: (order.get(change.word, -1), -change.margin))
    return Suggestions(
        words,
        len(images),
        float(own.agreement.mean()),
        float(own.margin.mean()),
        tuple(changes),
        _applied(words, changes),
    )


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Read a JSON file of texts for words, {"car": ["a parked car", ...]}. Raises UserError, one line."""
    try:
        data = json.loads(read_text(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    valid = isinstance(data, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in data.values()
    )
    if not valid:
        raise UserError(f'{path}: must be lists of texts by word, such as {{"car": ["a parked car"]}}')
    return data


def bundled_descriptions() -> dict[str, list[str]]:
    """Return the descriptions of common words that come with the package."""
    return json.loads((ASSETS / "descriptions.json").read_text(encoding="utf-8"))


def see(segmenter: ProposalSegmenter, image: np.ndarray) -> SeenImage:
    """Encode an image as it is, mirrored, and smaller."""
    config = segmenter.image_config
    sides = {side: round(getattr(config, side) * SMALLER) for side in ("short_side", "long_side")}
    smaller = config.model_copy(update=sides)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    views = [
        InputImage(None, prepare_array(one, by)) for one, by in ((image, config), (mirrored, config), (image, smaller))
    ]
    height, width = image.shape[:2]
    rows, columns = (np.linspace(0, side - 1, min(GRID, side)).round().astype(int) for side in (height, width))
    pixels = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    flipped = np.stack([pixels[:, 0], width - 1 - pixels[:, 1]], axis=1)
    found = []
    for encoding, places in zip(segmenter.encode_read(views, batch_size=1), (pixels, flipped, pixels), strict=True):
        masks = masks_of_pixels(to_array(encoding["mask_logits"]), encoding.sizes, places)
        found.append((encoding, masks))
    return SeenImage(tuple(found))


def answers_of(segmenter: ProposalSegmenter, seen: Sequence[SeenImage], words: Vocabulary) -> Answers:
    """Label the pixels of all images in all their views, and tell how sure the answers are."""
    winners, agreement, margin = [], [], []
    for image in seen:
        scores = [masks @ to_array(segmenter.class_probabilities(encoding, words)) for encoding, masks in image.views]
        first, *others = (of_view.argmax(axis=1) for of_view in scores)
        best = np.sort(scores[0], axis=1)[:, -2:]
        winners.append(first)
        agreement.append(np.mean([(other == first).mean() for other in others]))
        margin.append(((best[:, 1] - best[:, 0]) / np.maximum(scores[0].sum(axis=1), 1e-9)).mean())
    longest = max(map(len, winners))
    even = [np.pad(one, (0, longest - len(one)), constant_values=-1) for one in winners]  # of images of a few pixels
    return Answers(np.stack(even), np.array(agreement), np.array(margin))


def _tried(
    words: Vocabulary, descriptions: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, tuple[str, ...], str, Vocabulary]]:
    """Yield all changes: the word, its texts (or the templates), their origin, and the words so changed."""
    for name, templates in STYLES.items():
        if templates != words.templates:
            yield "", templates, name, replace(words, templates=templates)
    bundled = bundled_descriptions()
    yours = {words.find(name): texts for name, texts in descriptions.items()}
    for place, word in enumerate(words.words):
        if word.prompts or word.nothing:
            continue  # the user wrote its sentences, or it has none
        texts = {text: "description" for name in word.synonyms for text in bundled.get(name.lower().strip(), ())}
        texts |= {text: "yours" for text in yours.get(place, ())}
        texts |= {text: "synonym" for text in word.synonyms[1:]}
        options: list[tuple[tuple[str, ...], str]] = [((text,), origin) for text, origin in texts.items()]
        options += [((*word.synonyms, text), "joined") for text, origin in texts.items() if origin != "synonym"]
        for synonyms, origin in options:
            try:
                yield word.name, synonyms, origin, _with_texts(words, word.name, synonyms)
            except UserError:
                continue  # another word has this text


def _with_texts(words: Vocabulary, name: str, texts: tuple[str, ...]) -> Vocabulary:
    changed = tuple(Word(word.name, texts, absorbs=word.absorbs) if word.name == name else word for word in words.words)
    return replace(words, words=changed)


def _change(
    own: Answers, answers: Answers, words: Vocabulary, word: str, texts: tuple[str, ...], origin: str
) -> Change:
    differences = answers.agreement - own.agreement, answers.margin - own.margin
    areas = [np.bincount(one.winners[one.winners >= 0], minlength=len(words.words)) for one in (own, answers)]
    lost = (areas[0] >= LEAST * areas[0].sum()) & (2 * areas[1] < areas[0])
    place = next((place for place, one in enumerate(words.words) if one.name == word), None)
    return Change(
        word,
        texts,
        origin,
        agreement=float(differences[0].mean()),
        margin=float(differences[1].mean()),
        surely=(_low(differences[0]), _low(differences[1])),
        area=1.0 if place is None else float((answers.winners == place).mean()),
        moved=float((answers.winners != own.winners).mean()),
        loses=tuple(one.name for one, gone in zip(words.words, lost, strict=True) if gone),
    )


def _low(differences: np.ndarray) -> float:
    """Return the lower end of the mean's interval of 95 %, by Student's t; minus infinity for one image."""
    count = len(differences)
    if count < 2:
        return -float("inf")
    from scipy.stats import t  # here, because it takes long to import

    return float(differences.mean() - t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5)


def _applied(words: Vocabulary, changes: Sequence[Change]) -> Vocabulary:
    """Return the words with the suggested change of each that raises the margin most; `changes` are so sorted."""
    done: set[str] = set()
    for change in changes:
        if change.suggested and change.word not in done:
            done.add(change.word)
            if change.word:
                words = _with_texts(words, change.word, change.texts)
            else:
                words = replace(words, templates=change.texts)
    return words
