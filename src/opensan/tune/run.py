"""Tune words with few labelled images: `opensan.tune_words`.

Letters: I images, Q queries, K words, R text rows, D embedding, n pixels.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import masks_of_pixels
from opensan.choices import Tuned
from opensan.errors import UserError, short
from opensan.evaluation.metrics import Counts
from opensan.files import json_text, write_text
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import load_with_torch
from opensan.segmenters.results import Encoding
from opensan.segmenters.san import SanSegmenter
from opensan.structures import TextClassifier
from opensan.tune.examples import Example, example_of, read_examples
from opensan.tune.vectors import STEPS, Fitted, Sample, confusion, fit, folds, left_out
from opensan.vocabulary import Templates, Vocabulary
from opensan.word_lists import TunedWords

MOST_GROUPS = 5
"""Groups of images that are left out by turns."""

STEPS_UNCHECKED = 5
"""Steps where a single image is labelled, so that none can be left out to find their number."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many parts of it are, and of how many."""


@dataclass(frozen=True)
class WordFigures:
    """How well the words fit the labelled pixels, each in [0, 1]."""

    miou: float
    """Mean IoU over the words that have labels."""
    pixel_accuracy: float
    words: Mapping[str, float]
    """IoU of each word that has labels."""

    @classmethod
    def of(cls, pixels: np.ndarray, names: Sequence[str]) -> "WordFigures":
        """Compute them from [K, K + 1] pixels of each word that were labelled as each."""
        counts = Counts(len(names))
        counts.confusion += pixels
        found = counts.metrics(names)
        return cls(found.miou, found.pixel_accuracy, {one.name: one.iou for one in found.classes if one.pixels})

    @classmethod
    def mean(cls, parts: Sequence["WordFigures"]) -> "WordFigures":
        """Return the mean of several seeds' figures."""
        return cls(
            float(np.mean([part.miou for part in parts])),
            float(np.mean([part.pixel_accuracy for part in parts])),
            {name: float(np.mean([part.words[name] for part in parts])) for name in parts[0].words},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "words": dict(self.words)}


@dataclass(frozen=True)
class Tuning:
    """Result of `tune_words`."""

    vocabulary: Vocabulary
    """The words with their vectors, for `segment` and all else that takes words; as before if nothing helped."""
    images: int
    """Labelled images."""
    pixels: int
    """Labelled pixels in them."""
    steps: int
    """Steps of the gradient descent; 0 if none made images that were left out better."""
    before: WordFigures
    after: tuple[WordFigures, ...]
    """Figures of each seed."""
    held_out: bool
    """Whether the figures are those of images that the vectors were not fitted to; False for a single image."""
    unlabelled: tuple[str, ...]
    """Words without a labelled pixel, which keep their text."""

    @property
    def helped(self) -> bool:
        """Whether the words are better than before on images that were left out (always, for a single image)."""
        return self.steps > 0

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest mean IoU of the seeds."""
        return min(one.miou for one in self.after), max(one.miou for one in self.after)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the words with their vectors: a word file (JSON), all or nothing."""
        path = Path(path)
        if path.suffix.lower() != ".json":
            raise UserError(f"{path}: words are written as JSON: give a name that ends in .json")
        write_text(path, json_text(self.vocabulary.to_dict(vectors=True), indent=1) + "\n")
        return path


def tune_words(
    data: "str | os.PathLike[str] | Sequence[tuple[Any, Any]]",
    words: Any = None,
    model: "Segmenter | str | os.PathLike[str]" = "san-vit-b16",
    *,
    background: Iterable[Any] = (),
    templates: Templates | None = None,
    what: Tuned = "vectors",
    split: str | None = None,
    ignored: Sequence[str] = (),
    limit: int | None = 50,
    seeds: int = 3,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Tuning:
    """Fit words to a few labelled images, as `opensan tune words` does: the words' vectors alone, not the model.

    Every image is encoded once. Then vectors are fitted to its labelled pixels, starting from the words' own text rows,
    for as many steps as make images that were left out best.

    Args:
        data: a folder with images/, labels/ and classes.txt (as `opensan data prepare` makes, or without lists), a
            .json file of points and scribbles, or pairs of an image (anything that `Segmenter.encode` takes, or an
            Encoding) and its labels, [H, W] whole numbers: index of the word, negative where unlabelled.
        words: as for `Segmenter.segment`; None: those that `data` names.
        model: a segmenter that `opensan.load` returned, or what `opensan.load` takes.
        background: as for `Segmenter.segment`.
        templates: as for `Segmenter.segment`.
        what: "vectors" (one for each labelled word: other words stay as they are), "context" (one offset for all
            words), or "both".
        split: the list of images; None: train, or all.
        ignored: classes whose pixels count as unlabelled.
        limit: most images, spread evenly over the list; None for all.
        seeds: fits with other pixels; the vectors are their means.
        out: a .json file to write the words to, unless nothing helped.
        progress: called with the name of the step, how many parts are done, and how many there are.

    Raises:
        ValueError: one line: nothing labelled, labels of words that are not asked for, or a model without proposals.
    """
    if what not in get_args(Tuned):
        raise UserError(f"what {short(what)} is not one of {', '.join(get_args(Tuned))}")
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, not {seeds}")
    vocabulary = None
    if words is not None:
        vocabulary = Vocabulary.parse(words, background=background, templates=templates)
    elif background or templates is not None:
        raise UserError("background and templates belong to words: give these too")
    if isinstance(data, str | os.PathLike):
        examples, vocabulary = read_examples(Path(data), vocabulary, split=split, ignored=ignored, limit=limit)
    elif vocabulary is None:
        raise UserError("words are needed with images in memory: labels are indices into them")
    else:
        examples = [example_of(f"image {n}", image, labels, vocabulary) for n, (image, labels) in enumerate(data, 1)]
    examples = [example for example in examples if len(example.labels)]
    check_labels(examples, vocabulary)
    tuning = fit_words(as_tunable(model), examples, replace(vocabulary, tuned=None), what, seeds, progress)
    if out is not None and tuning.helped:
        tuning.save(out)
    return tuning


def as_tunable(model: "Segmenter | str | os.PathLike[str]") -> SanSegmenter:
    """Return a loaded model. Raises UserError, one line, if its words cannot be tuned."""
    segmenter = model if isinstance(model, Segmenter) else load_with_torch(model)
    # Baselines on SAN's weights classify in other ways than the loss does.
    if type(segmenter) is not SanSegmenter:
        raise UserError(
            f"words are tuned with SAN as torch runs it, and {segmenter.identity.name} is an exported model or another "
            "method: tune with the model that it was made of"
        )
    return segmenter


def check_labels(examples: Sequence[Example], vocabulary: Vocabulary) -> None:
    """Raise UserError, one line, unless two words have labelled pixels."""
    counts = sum((example.counts for example in examples), np.zeros(len(vocabulary.words), dtype=np.int64))
    names = [word.name for word, count in zip(vocabulary.words, counts, strict=True) if count]
    if not names:
        raise UserError("no pixel is labelled: label some of at least two words")
    if len(names) == 1:
        pixels = "the only labelled pixel is" if counts.sum() == 1 else f"all {counts.sum():,} labelled pixels are"
        raise UserError(
            f"{pixels} of {short(names[0])}: label some of another word too, or it would learn to take every pixel"
        )


def encode_examples(
    segmenter: SanSegmenter, examples: Sequence[Example], progress: Progress = lambda step, done, total: None
) -> list[Sample]:
    """Encode the images, one at a time, and keep what tuning needs of each."""
    samples = []
    for done, example in enumerate(examples):
        progress("encoding images", done, len(examples))
        image = example.image
        encoding = image if isinstance(image, Encoding) else segmenter.encode(image)
        segmenter.check_encoding(encoding)
        if example.size is not None and example.size != encoding.sizes.image:
            sizes = (f"{width}x{height}" for height, width in (example.size, encoding.sizes.image))
            raise UserError("{}: its labels are {}, the image {} (width x height)".format(example.name, *sizes))
        masks = masks_of_pixels(to_array(encoding["mask_logits"]), encoding.sizes, example.pixels)
        samples.append(
            Sample(
                # Copies: tensors of inference mode cannot take part in a training.
                torch.tensor(to_array(encoding["mask_embeddings"]), device=segmenter.device),
                torch.tensor(masks, device=segmenter.device),
                torch.tensor(example.labels, device=segmenter.device),
                example.counts,
            )
        )
    return samples


def fit_words(
    segmenter: SanSegmenter,
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    what: Tuned,
    seeds: int,
    progress: Progress = lambda step, done, total: None,
    *,
    seen: bool = False,
) -> Tuning:
    """Encode the examples and tune the words; see `tune_words`, and `fit_samples` for `seen`."""
    text = segmenter.text.classifier(vocabulary)
    samples = encode_examples(segmenter, examples, progress)
    return fit_samples(segmenter, samples, vocabulary, text, what, seeds, progress, seen=seen)


def fit_samples(
    segmenter: SanSegmenter,
    samples: Sequence[Sample],
    vocabulary: Vocabulary,
    text: TextClassifier,
    what: Tuned,
    seeds: int,
    progress: Progress = lambda step, done, total: None,
    *,
    seen: bool = False,
) -> Tuning:
    """Tune the words with encoded images.

    With `seen`, somebody looks at the answer at once and can go back: no images are left out, and there are as many
    steps as it takes until the labelled pixels themselves are right.
    """
    model, names = segmenter.model, [word.name for word in vocabulary.words]
    groups = folds(len(samples), MOST_GROUPS) if len(samples) > 1 and not seen else []
    total, done = seeds * (len(groups) + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("fitting vectors", done, total)

    progress("fitting vectors", 0, total)
    by_seed = [
        {step: WordFigures.of(pixels, names) for step, pixels in found.items()}
        for seed in range(seeds)
        if groups
        for found in [left_out(model, text, samples, groups, what=what, seed=seed, advance=advance)]
    ]
    if groups:
        mean = {step: float(np.mean([figures[step].miou for figures in by_seed])) for step in STEPS}
        steps = max(STEPS, key=lambda step: (round(mean[step], 4), -step))
    else:
        steps = _enough(segmenter, text, samples, names, what) if seen else STEPS_UNCHECKED
    fits: list[Fitted] = []
    for seed in range(seeds if steps else 0):
        fits += [found for _, found in fit(model, text, samples, what=what, seed=seed, steps=(steps,))]
        advance()
    counts = sum((sample.counts for sample in samples), np.zeros(len(names), dtype=np.int64))
    if groups:
        before, after = by_seed[0][0], tuple(figures[steps] for figures in by_seed)
    else:
        before = _figures(segmenter, text, samples, names)
        after = tuple(_figures(segmenter, replace(text, rows=one.rows), samples, names) for one in fits)
    tuning = Tuning(
        vocabulary,
        images=len(samples),
        pixels=int(counts.sum()),
        steps=steps,
        before=before,
        after=after,
        held_out=bool(groups),
        unlabelled=tuple(name for name, count in zip(names, counts, strict=True) if not count),
    )
    if not steps:
        return tuning
    tuned = _tuned_words(segmenter, vocabulary, fits, what, counts, _about(tuning, what))
    return replace(tuning, vocabulary=replace(vocabulary, tuned=tuned))


def _enough(
    segmenter: SanSegmenter, text: TextClassifier, samples: Sequence[Sample], names: Sequence[str], what: Tuned
) -> int:
    """Return the fewest of STEPS with the best mean IoU at the labelled pixels; 0 is not one of them."""
    best, enough = -1.0, 0
    for step, fitted in fit(segmenter.model, text, samples, what=what, seed=0, steps=STEPS[1:]):
        miou = _figures(segmenter, replace(text, rows=fitted.rows), samples, names).miou
        if miou > best + 1e-6:
            best, enough = miou, step
        if best > 1 - 1e-6:
            break
    return enough


def _figures(
    segmenter: SanSegmenter, text: TextClassifier, samples: Sequence[Sample], names: Sequence[str]
) -> WordFigures:
    text = replace(text, first_equal=None)
    pixels = [confusion(segmenter.model, text, sample) for sample in samples]
    return WordFigures.of(np.sum(pixels, axis=0), names)


def _about(tuning: Tuning, what: Tuned) -> dict[str, Any]:
    """Return how the vectors were found, for people who open the file."""
    return {
        "images": tuning.images,
        "pixels": tuning.pixels,
        "what": what,
        "steps": tuning.steps,
        "seeds": len(tuning.after),
        "left_out": tuning.held_out,
        "miou": {"before": tuning.before.miou, "after": [one.miou for one in tuning.after]},
    }


def _tuned_words(
    segmenter: SanSegmenter,
    vocabulary: Vocabulary,
    fits: Sequence[Fitted],
    what: Tuned,
    counts: np.ndarray,
    about: Mapping[str, Any],
) -> TunedWords:
    """Return the mean of the seeds' vectors, of the words that have labels."""
    rows = torch.stack([one.rows for one in fits]).mean(dim=0)
    context = torch.stack([one.context for one in fits]).mean(dim=0)
    texts = [synonym for word in vocabulary.words for synonym in word.synonyms]
    kept = [row for row, word in enumerate(vocabulary.row_class) if counts[word]] if what != "context" else []
    vectors = torch.nn.functional.normalize(rows, dim=1)
    return TunedWords(
        model=segmenter.identity.name,
        image=segmenter.identity.image,
        text=segmenter.identity.text,
        rows=tuple((texts[row], _bytes(vectors[row])) for row in kept),
        context=None if what == "vectors" else _bytes(context),
        about=json.dumps(about, sort_keys=True, ensure_ascii=False),
    )


def _bytes(vector: torch.Tensor) -> bytes:
    return vector.cpu().numpy().astype("<f2").tobytes()
