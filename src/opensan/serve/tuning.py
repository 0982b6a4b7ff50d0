"""Fit words to points that somebody marked in encoded images: what `opensan tune words` does, over HTTP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from opensan.errors import UserError, short
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.serve.limits import Problem
from opensan.serve.schemas import MarkedImage, TunedSpec, TuningAnswer, TuningQuestion
from opensan.serve.waiting import while_there
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.serve.app import Service

SEEDS = 3
"""Fits with other pixels, of which the mean is taken."""


def add_tuning_route(api: APIRouter, service: "Service", responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the route that fits words."""

    @api.post("/v1/tunings", tags=["words"], responses=responses)
    async def tune(question: TuningQuestion, request: Request) -> TuningAnswer:
        """Fit the words' vectors to marks in encoded images. Neither ViT runs, and nothing is kept here."""
        vocabulary = question.vocabulary(service.limits)
        encodings = [await service.kept(image.id) for image in question.images]
        segmenter = service.models.of(encodings[0])
        if any(service.models.of(encoding) is not segmenter for encoding in encodings):
            raise Problem(422, "the images were encoded by several models: words are fitted for one")
        work = service.engine.ask(
            lambda: fitted(segmenter, encodings, question.images, vocabulary),
            before=service.reading(segmenter, vocabulary),
        )
        return await while_there(request, work)


def fitted(
    segmenter: Segmenter, encodings: Sequence[Encoding], images: Sequence[MarkedImage], vocabulary: Vocabulary
) -> TuningAnswer:
    """Fit the words to the marks. Raises UserError, one line, for marks or a model that words can't be fitted to."""
    from opensan.tune.examples import Mark, example_of_marks  # here: exported models are served without torch
    from opensan.tune.run import as_tunable, check_labels, fit_words

    tunable = as_tunable(segmenter)
    examples = []
    for number, (encoding, image) in enumerate(zip(encodings, images, strict=True), 1):
        name, marks = f"image {number}", []
        for mark in image.marks:
            if (word := vocabulary.find(mark.word)) is None:
                raise UserError(f"{name} has marks of {short(mark.word)}, which is not among the words: ask for it too")
            marks.append(Mark(word, mark.places, mark.joined))
        examples.append(example_of_marks(name, encoding, encoding.sizes.image, marks, vocabulary))
    check_labels(examples, vocabulary)
    tuning = fit_words(tunable, examples, vocabulary, "vectors", SEEDS, seen=True)
    tuned = tuning.vocabulary.tuned
    assert tuned is not None
    after = [figures.miou for figures in tuning.after]
    return TuningAnswer(
        tuned=TunedSpec.model_validate(tuned.to_dict()),
        images=tuning.images,
        pixels=tuning.pixels,
        unmarked=list(tuning.unlabelled),
        before=tuning.before.miou,
        after=sum(after) / len(after),
    )
