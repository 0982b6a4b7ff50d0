"""Fit words to points that somebody marked in encoded images: what `opensan tune words` does, over HTTP."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

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
        work: Callable[[], TuningAnswer] = lambda: fitted(segmenter, encodings, question.images, vocabulary)  # noqa: E731
        return await while_there(request, service.engine.ask(work, before=service.reading(segmenter, vocabulary)))


def fitted(
    segmenter: Segmenter, encodings: Sequence[Encoding], images: Sequence[MarkedImage], vocabulary: Vocabulary
) -> TuningAnswer:
    """Fit the words to the marks. Raises UserError, one line, for marks or a model that words can't be fitted to."""
    from opensan.tune.examples import Mark, example_of_marks
    from opensan.tune.run import as_tunable, check_labels, fit_words

    tunable = as_tunable(segmenter)
    examples = [
        example_of_marks(
            f"image {number}",
            encoding,
            encoding.sizes.image,
            [Mark(mark.word, mark.places, mark.joined) for mark in image.marks],
            vocabulary,
        )
        for number, (encoding, image) in enumerate(zip(encodings, images, strict=True), 1)
    ]
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
